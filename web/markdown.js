/**
 * The little Markdown that models write, as DOM nodes: headings, lists, quotes, code, bold, italic.
 *
 * Text becomes text nodes and nothing else: no HTML, no links, no images, so an answer can neither run nor fetch
 * anything. An unfinished construct (the answer is still being written) is shown as far as it goes.
 */

const FENCE = /^\s*(```|~~~)\s*([\w+#.-]*)/;
const HEADING = /^\s{0,3}(#{1,6})\s+(.*?)\s*#*$/;
const ITEM = /^(\s*)([-*+]|\d{1,9}[.)])\s+(.*)$/;
const QUOTE = /^\s{0,3}>\s?(.*)$/;
const INLINE = /`([^`\n]+)`|\*\*(?=\S)([^*]+?)\*\*|__(?=\S)([^_]+?)__|\*(?=\S)([^*\n]+?)\*|(?<!\w)_(?=\S)([^_\n]+?)_(?!\w)/g;

/** @param {string} text @returns {DocumentFragment} */
export function render(text) {
  const root = document.createDocumentFragment();
  const lines = text.split("\n");
  for (let i = 0; i < lines.length; ) {
    const line = lines[i];
    const fence = line.match(FENCE);
    if (fence) {
      const code = [];
      for (i += 1; i < lines.length && !lines[i].trimStart().startsWith(fence[1]); i += 1) code.push(lines[i]);
      i += 1;
      const pre = root.appendChild(element("pre"));
      pre.tabIndex = 0; // scrollable, so reachable by keyboard
      pre.append(element("code", code.join("\n")));
    } else if (HEADING.test(line)) {
      const [, marks, title] = line.match(HEADING);
      root.append(inline(element(`h${Math.min(marks.length + 2, 6)}`), title)); // h1 and h2 belong to the page
      i += 1;
    } else if (ITEM.test(line)) {
      i = list(root, lines, i);
    } else if (QUOTE.test(line)) {
      const quoted = [];
      for (; i < lines.length && QUOTE.test(lines[i]); i += 1) quoted.push(lines[i].match(QUOTE)[1]);
      root.appendChild(element("blockquote")).append(render(quoted.join("\n")));
    } else if (line.trim() === "") {
      i += 1;
    } else {
      const paragraph = [];
      for (; i < lines.length && lines[i].trim() !== "" && !startsBlock(lines[i]); i += 1) paragraph.push(lines[i]);
      root.append(inline(element("p"), paragraph.join("\n")));
    }
  }
  return root;
}

function startsBlock(line) {
  return FENCE.test(line) || HEADING.test(line) || ITEM.test(line) || QUOTE.test(line);
}

/** Items of one list, nested ones by their indentation. Returns the index of the first line after it. */
function list(parent, lines, start) {
  const [, indent, marker] = lines[start].match(ITEM);
  const ordered = /\d/.test(marker);
  const node = parent.appendChild(element(ordered ? "ol" : "ul"));
  if (ordered && parseInt(marker, 10) !== 1) node.start = parseInt(marker, 10);
  let item;
  let i = start;
  while (i < lines.length) {
    const match = lines[i].match(ITEM);
    if (match && match[1].length > indent.length + 1 && item) {
      i = list(item, lines, i);
    } else if (match) {
      if (match[1].length < indent.length || /\d/.test(match[2]) !== ordered) break;
      item = node.appendChild(inline(element("li"), match[3]));
      i += 1;
    } else if (lines[i].trim() === "" && ITEM.test(lines[i + 1] ?? "")) {
      i += 1;
    } else if (lines[i].trim() !== "" && /^\s/.test(lines[i]) && !FENCE.test(lines[i])) {
      inline(item, `\n${lines[i].trim()}`);
      i += 1;
    } else {
      break;
    }
  }
  return i;
}

function inline(parent, text) {
  let end = 0;
  for (const match of text.matchAll(INLINE)) {
    const [whole, code, strong, strong2, italic, italic2] = match;
    parent.append(text.slice(end, match.index));
    if (code !== undefined) parent.append(element("code", code));
    else if (strong ?? strong2) parent.append(inline(element("strong"), strong ?? strong2));
    else parent.append(inline(element("em"), italic ?? italic2));
    end = match.index + whole.length;
  }
  parent.append(text.slice(end));
  return parent;
}

function element(name, text = "") {
  const node = document.createElement(name);
  if (text) node.textContent = text;
  return node;
}
