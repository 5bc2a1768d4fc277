"""The Pyodide example in README.md runs as it stands: in a plain web worker, without the page's scripts."""

import re
from pathlib import Path

README = Path(__file__).resolve().parents[2] / "README.md"
RUN_IN_WORKER = """
async ([assets, code]) => {
  const script = `
    import { loadPyodide } from "${assets}pyodide.mjs";
    const lines = [];
    const options = { indexURL: "${assets}", packageBaseUrl: "${assets}", packages: ["realm-web"] };
    try {
      const pyodide = await loadPyodide({ ...options, stdout: (line) => lines.push(line) });
      await pyodide.runPythonAsync(${JSON.stringify(code)});
      postMessage({ printed: lines.join(" ") });
    } catch (error) {
      postMessage({ error: String(error) });
    }`;
  const url = URL.createObjectURL(new Blob([script], { type: "text/javascript" }));
  const worker = new Worker(url, { type: "module" });
  return await new Promise((resolve) => {
    worker.onmessage = ({ data }) => resolve(data);
    worker.onerror = (event) => resolve({ error: event.message || "the worker did not start" });
  });
}
"""


def example() -> str:
    """From the first line after micropip, which the site's own wheels stand in for, to the end."""
    blocks = re.findall(r"^```python\n(.*?)^```", README.read_text("utf-8"), re.M | re.S)
    (code,) = (block for block in blocks if "micropip" in block)
    return code[code.index("from pyodide.code") :]


def test_the_pyodide_example_reads_a_model_by_ranges_and_prints_text(browser, web):
    page = browser.new_page()
    page.goto(web.url + "models.json")  # any address of the site: the example needs no page
    code = example().replace("https://your.site/models/model.gguf", web.url + "models/small.gguf")
    code = code.replace('"Once upon a time"', '"Once", SamplingParams(max_tokens=4, ignore_eos=True)')
    code = code.replace("import Engine", "import Engine, SamplingParams") + "print()\n"
    found = page.evaluate(RUN_IN_WORKER, [web.url + "assets/", code])
    page.close()
    assert found.get("printed"), found
