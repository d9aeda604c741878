"""The ledger of equations and the errata: which cell proves, checks or refutes what.

Both are made from the lines that `prove`, `check` and `refute` of lfdm.core leave in the notebooks. Words and
places stand in nbs/reference/equations.toml and nbs/reference/errata.toml. `python tools/ledger.py` gives an entry that was open the
status of its first check, writes the tables into the two pages, and says what is wrong and what is open.
"""
import ast
import functools
import json
import os
import re
import sys
import tomllib
from collections import Counter
from pathlib import Path
from types import SimpleNamespace

ROOT = Path(__file__).resolve().parent.parent
NBS = ROOT / "nbs"
REFERENCE = NBS / "reference"
PAGES = ("reference/equations.ipynb", "reference/errata.ipynb")

# --- the numbers of the four documents, in the order in which they occur there

DOCUMENTS = {
    "thesis": [f"{chapter}.{i}" for chapter, last in ((2, 20), (3, 64), (4, 6)) for i in range(1, last + 1)],
    "paper": [str(i) for i in range(1, 20)],
    "Kingma & Gao": [str(i) for i in range(1, 93)] + ["E.3"],   # E.3: a table without a number
    "note": [str(i) for i in range(1, 8)] + ["W1", "W2", "W3", "W4"],   # displayed equations, and the rows of the table of weightings
}
TITLES = {"thesis": "The thesis", "paper": "The paper", "Kingma & Gao": "Kingma & Gao", "note": "The training-objective document"}
NUMBER = {"thesis": r"\d\.\d+", "paper": r"\d+", "Kingma & Gao": r"(?:\d+|E\.3)", "note": r"(?:\d+|W\d)"}
STATUSES = {"proved": "proved by sympy", "checked": "checked numerically", "definition": "definition", "background": "background",
            "wrong": "wrong as printed", "open": "open"}
VERDICTS = ("proved", "checked", "refuted")


def named(text):
    """The equations a text names: 'Kingma & Gao 34, 35; 36 with 1/π' -> 34, 35 and 36.

    Numbers follow the document's name at once, joined by commas, `and`, `with` or `so`; `to` and – span a range. A text beside an equation, as in 'thesis, text before 3.52' or 'paper 8, the text after it', is not the equation, nor is an equation under another condition, 'paper 8, if ...'.
    """
    found = []
    for document, known in DOCUMENTS.items():
        number = rf"(?<![\w./])({NUMBER[document]})(?![\w/(]|\.\d|,? the text|, if )"
        for start in re.finditer(rf"(?<![\w-]){re.escape(document)}'?s? +(?={NUMBER[document]})", text):
            rest, previous = text[start.end():], None
            joint = r""
            while m := re.match(joint + number, rest):
                first = known.index(previous) + 1 if previous in known and re.match(r"\s*(to|–)", m[0]) else None
                last = m[1]
                if first is not None and last in known: found += [(document, n) for n in known[first:known.index(last) + 1]]
                else: found.append((document, last))
                previous, rest = last, rest[m.end():]
                joint = r"(?:\s*(?:[,;]|\bto\b|–|\band\b|\bwith\b)(?:\s*(?:so|and|with))?)\s*"
    return list(dict.fromkeys(found))


# --- the notebooks

def heading_id(text):
    "The address of a heading within its page."
    explicit = re.search(r"\{#([\w-]+).*?\}\s*$", text)
    if explicit: return explicit[1]
    return re.sub(r"\s+", "-", re.sub(r"[^\w\s.-]", "", text).strip().lower())


def pages():
    "Every notebook that has a page."
    return sorted(path for path in NBS.rglob("*.ipynb") if not any(part.startswith((".", "_")) for part in path.relative_to(NBS).parts))


def read(path):
    "A notebook's title and its cells with the heading above each: (kind, source, printed text, heading)."
    return _read(path, path.stat().st_mtime_ns)


@functools.cache
def _read(path, _):
    title, heading, cells = path.stem, None, []
    for cell in json.loads(path.read_text(encoding="utf-8"))["cells"]:
        source = "".join(cell["source"])
        if cell["cell_type"] == "markdown":
            for level, text in re.findall(r"^(#{1,4})\s+(.+)$", re.sub(r"^```.*?^```", "", source, flags=re.S | re.M), re.M):
                if level == "#": title, heading = re.sub(r"\s*\{.*\}$", "", text), None
                else: heading = text
        printed = "".join("".join(o["text"]) for o in cell.get("outputs", []) if o["output_type"] == "stream")
        cells.append((cell["cell_type"], source, printed, heading))
    return title, cells


def place(path, title, heading):
    "A place in a page, with its address and its name."
    address = str(path.relative_to(NBS)) + (f"#{heading_id(heading)}" if heading else "")
    words = re.sub(r"\s*\{.*\}$", "", heading) if heading else ""
    return SimpleNamespace(address=address, name=f"{title}: {words}" if words else title)


def checks():
    "Every verdict printed in a notebook: what it is, its source, the equations it names, and where it stands."
    found = []
    for path in pages():
        title, cells = read(path)
        for kind, code, printed, heading in cells:
            if kind != "code": continue
            can_fail = bool(re.search(r"\b(prove|check|refute|test_\w+)\(|\bassert\b", code))
            for verdict, rest in re.findall(rf"^({'|'.join(VERDICTS)}): (.+)$", printed, re.M):
                source = re.sub(r": (worst relative difference \S+|\S+ is not \S+)$", "", rest)   # without the numbers at its end
                found.append(SimpleNamespace(verdict=verdict, source=source, equations=named(source), place=place(path, title, heading), can_fail=can_fail))
    return found


def mentions(path):
    "The equations the prose of a page names; bare numbers in brackets, such as (3.21), are the thesis's."
    return _mentions(path, path.stat().st_mtime_ns)


@functools.cache
def _mentions(path, _):
    text = "\n\n".join(source for kind, source, _, _ in read(path)[1] if kind == "markdown")
    text = text.replace("\\&", "&").replace("training-objective document", "note")
    plain = re.sub(r"\s+", " ", re.sub(r"[()]", "", text))
    bare = [("thesis", n) for n in re.findall(r"(?<![\w.])([234]\.\d+)(?![\w.]*\d)", " ".join(re.findall(r"\(([^()]*)\)", text)))]
    return set(named(plain)) | {e for e in bare if e[1] in DOCUMENTS["thesis"]}


# --- the ledger

def entries():
    "Each equation's entry as written: (document, number) -> its fields."
    with open(REFERENCE / "equations.toml", "rb") as file: written = tomllib.load(file)
    return {(document, number): fields for document, rows in written.items() for number, fields in rows.items()}


def ledger(lines=None):
    "Each equation with its words, its status as the checks give it, and its places."
    lines, rows = checks() if lines is None else lines, {}
    written = entries()
    for key, fields in written.items():
        twin = tuple(fields["same"].rsplit(" ", 1)) if "same" in fields else None
        at = {v: {l.place.address: l.place for l in lines if key in l.equations and l.verdict == v} for v in VERDICTS}
        status = fields.get("status") or (written[twin].get("status") if twin else None)
        waits = fields.get("open") or twin and written[twin].get("open")
        if twin:
            for v in VERDICTS: at[v] |= {l.place.address: l.place for l in lines if twin in l.equations and l.verdict == v}
        if waits: status = "open" if not (at["proved"] or at["checked"]) else "wrong" if at["refuted"] else "proved" if at["proved"] else "checked"
        if status == "checked" and at["proved"]: status = "proved"   # a proof is more than a check
        rows[key] = SimpleNamespace(key=key, says=fields["says"], status=status, at=at, twin=twin, where=fields.get("at") or (written[twin].get("at") if twin else None))
    return rows


def faults(lines=None):
    "What is wrong with the ledger: entries without what their status promises, and checks without an entry."
    lines = checks() if lines is None else lines
    rows, said = ledger(lines), []
    for line in lines:
        if not line.can_fail: said.append(f"{line.place.address} says `{line.source}` in a cell where nothing can fail")
        said += [f"{line.place.address} says `{line.source}`, and equations.toml has no {' '.join(e)}" for e in line.equations if e not in rows]
    for key, row in rows.items():
        name, at = " ".join(key), row.at
        if row.status not in STATUSES: said.append(f"{name} has no status of these: {', '.join(STATUSES)}")
        if row.status in ("proved", "checked") and not at[row.status]: said.append(f"{name} shall be {row.status}, but no cell prints `{row.status}: {name}`")
        if row.status == "wrong" and not (at["refuted"] and (at["proved"] or at["checked"])): said.append(f"{name} shall be wrong as printed, but is not both refuted as printed and proved as it should read")
        if row.status != "wrong" and at["refuted"]: said.append(f"{name} shall be {row.status}, but it is refuted in {', '.join(at['refuted'])}")
        if row.status in ("definition", "background"):
            if at["proved"] or at["checked"]: said.append(f"{name} shall be {row.status}, but {', '.join(at['proved'] | at['checked'])} has more to say: change its status")
            if not row.where: said.append(f"{name} needs a place: at = \"page.ipynb#heading\"")
        if row.where: said += [f"{name}: {fault}" for fault in place_faults(row.where, (row.twin or key, key))]
    return said


def place_faults(address, equations):
    "What is wrong with a place named in the data: no such page or heading, or a page that does not mention the equation."
    page, _, anchor = address.partition("#")
    path = NBS / page
    if not path.is_file(): return [f"there is no {page}"]
    found = {heading_id(heading) for *_, heading in read(path)[1] if heading}
    wrong = [f"{page} has no heading {anchor}"] if anchor and anchor not in found else []
    if equations and not mentions(path) & set(equations): wrong.append(f"{page} does not mention it")
    return wrong


# --- errata

def errata():
    "Each erratum as written."
    with open(REFERENCE / "errata.toml", "rb") as file: return [SimpleNamespace(**{"equations": [], "checks": [], "see": [], "quotes": []} | e) for e in tomllib.load(file)["erratum"]]


SETTLED = {"confirmed": "confirmed", "rejected": "rejected", "open": "open"}


def errata_faults(lines=None):
    "What is wrong with the errata: a verdict without its checks."
    lines = checks() if lines is None else lines
    sources, said, rows = {l.source for l in lines}, [], entries()
    for e in errata():
        if e.verdict not in SETTLED: said.append(f"{e.where}: the verdict must be one of {', '.join(SETTLED)}")
        said += [f"{e.where}: no cell proves, checks or refutes `{source}`" for source in e.checks if source not in sources]
        said += [f"{e.where}: {fault}" for address in e.see for fault in place_faults(address, None)]
        said += [f"{e.where}: there is no {equation}" for equation in e.equations if tuple(equation.rsplit(' ', 1)) not in rows]
        if e.verdict != "open" and not (e.checks or e.see or e.quotes): said.append(f"{e.where}: {e.verdict}, by what?")
    return said


# --- the pages

def cell_text(text): return re.sub(r"\s+", " ", text).replace("|", "\\|").strip()


def link(p): return f"[{cell_text(p.name)}]({os.path.relpath(p.address, REFERENCE.name)})"


def named_place(address):
    "The place that the data name."
    page, _, anchor = address.partition("#")
    title, cells = read(NBS / page)
    heading = next((h for *_, h in cells if h and heading_id(h) == anchor), None)
    return place(NBS / page, title, heading)


def row_id(key): return re.sub(r"\W+", "-", " ".join(key).lower().replace("kingma & gao", "kingma-gao"))


def where(row):
    "The links of one equation."
    words = [link(p) for p in (row.at["proved"] | row.at["checked"]).values()]
    if row.at["refuted"]: words.append("as printed, refuted: " + ", ".join(link(p) for p in row.at["refuted"].values()))
    if row.where and not words: words.append(link(named_place(row.where)))
    return "; ".join(words)


def table(document, rows=None):
    "One document's equations as a table in Markdown."
    rows = ledger() if rows is None else rows
    marks = {tuple(equation.rsplit(" ", 1)): i for i, e in enumerate(errata(), 1) for equation in e.equations}
    lines = ["| number | what it says | status | where |", "|:--|:----------|:--|:-------|"]
    for key, row in rows.items():
        if key[0] != document: continue
        twin = f"; as [{' '.join(row.twin)}](#{row_id(row.twin)})" if row.twin else ""
        mark = f" ([erratum {marks[key]}](errata.ipynb#erratum-{marks[key]}))" if key in marks else ""
        lines.append(f"| []{{#{row_id(key)}}}[{key[1]}](#{row_id(key)}) | {cell_text(row.says)}{twin}{mark} | {STATUSES[row.status].split(' by ')[0].split(' numer')[0]} | {where(row)} |")
    return "\n".join(lines)


def counts(rows=None):
    "How many equations of each document have which status."
    rows = ledger() if rows is None else rows
    used = [s for s in STATUSES if any(row.status == s for row in rows.values())]
    lines = ["| | " + " | ".join(STATUSES[s] for s in used) + " | all |", "|:--|" + "--:|" * (len(used) + 1)]
    for document, title in [*TITLES.items(), (None, "**all**")]:
        c = Counter(row.status for key, row in rows.items() if document in (key[0], None))
        lines.append(f"| {title} | " + " | ".join(str(c[s] or "") for s in used) + f" | {sum(c.values())} |")
    return "\n".join(lines)


def errata_counts():
    "How many errata of each kind."
    lines = ["| | " + " | ".join(SETTLED.values()) + " |", "|:--|" + "--:|" * len(SETTLED)]
    for title, found in (("suspected before, now settled", False), ("found by this project", True)):
        c = Counter(e.verdict for e in errata() if bool(getattr(e, "found", False)) == found)
        lines.append(f"| {title} | " + " | ".join(str(c[v]) for v in SETTLED) + " |")
    return "\n".join(lines)


def errata_list(document, lines=None):
    "One document's errata in Markdown."
    lines, parts = checks() if lines is None else lines, []
    for i, e in enumerate(errata(), 1):
        if e.document != document: continue
        at = {l.place.address: l.place for source in e.checks for l in lines if l.source == source} | {a: named_place(a) for a in e.see}
        rows = [f"### {i}. {e.where} {{#erratum-{i}}}", "", f"**{SETTLED[e.verdict].capitalize()}**{', found by this project' if getattr(e, 'found', False) else ''}.", "",
                f"- *Printed*: {e.printed}", f"- *Right*: {e.right}", f"- *What changes*: {e.changes}"]
        if at: rows.append(f"- *Settled by*: {', '.join(link(p) for p in at.values())}" + (f", on the lines {', '.join(f'`{s}`' for s in e.checks)}" if e.checks else ""))
        else: rows.append("- *Settled by*: reading; the two statements stand in the documents")
        parts.append("\n".join(rows))
    return "\n\n".join(parts)


def shown(source):
    "What a cell of a page shows: the value of its last line."
    tree = ast.parse(source)
    scope = {"ledger": sys.modules[__name__], "Markdown": str}
    exec(compile(ast.Module(tree.body[:-1], []), "page", "exec"), scope)
    return eval(compile(ast.Expression(tree.body[-1].value), "page", "eval"), scope)


def refresh(path):
    "A page's text with its tables as they should be."
    page = json.loads(path.read_text(encoding="utf-8"))
    for cell in page["cells"]:
        source = "".join(cell["source"])
        if cell["cell_type"] != "code" or "Markdown(ledger." not in source: continue
        text = shown(source)
        cell["outputs"] = [{"data": {"text/markdown": text.splitlines(keepends=True), "text/plain": ["<IPython.core.display.Markdown object>"]},
                            "execution_count": None, "metadata": {}, "output_type": "execute_result"}]
    return json.dumps(page, indent=1, ensure_ascii=False, sort_keys=True) + "\n"


def settle(rows):
    "Write the statuses that `open = true` waited for into equations.toml."
    path, document = REFERENCE / "equations.toml", None
    lines = path.read_text(encoding="utf-8").splitlines(keepends=True)
    for i, line in enumerate(lines):
        if head := re.match(r'\["?(.+?)"?\]$', line.strip()): document = head[1]
        row = re.match(r'"(.+?)" = \{ open = true,', line)
        if row and rows[document, row[1]].status != "open": lines[i] = line.replace("open = true", f'status = "{rows[document, row[1]].status}"')
    path.write_text("".join(lines), encoding="utf-8")


def main():
    settle(ledger())
    for name in PAGES:
        path = NBS / name
        text = refresh(path)
        if text != path.read_text(encoding="utf-8"): path.write_text(text, encoding="utf-8"); print(f"wrote {path.relative_to(ROOT)}")
    lines = checks()
    for fault in faults(lines) + errata_faults(lines): print(fault)
    waiting = [" ".join(key) for key, row in ledger(lines).items() if row.status == "open"]
    if waiting: print(f"open: {', '.join(waiting)}")


if __name__ == "__main__": main()
