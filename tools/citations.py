"Citations without pandoc: [@ddpm, eq. 3] and @ddpm become text, as Quarto would write them."
import re
from pathlib import Path

BIB = Path(__file__).parent.parent / "nbs" / "references.bib"
CODE = re.compile(r"(^```.*?^```|`[^`\n]+`)", re.S | re.M)  # code stays as it is
GROUP = re.compile(r"\[([^\[\]]*@[^\[\]]*)\](?!\()")
ITEM = re.compile(r"(?P<before>[^@;]*)@(?P<key>[\w-]+)(?P<after>[^;]*)")  # words; @key, where
BARE = re.compile(r"(?<![\w@/.\[-])@([a-z][\w-]*)")


def references():
    "Every entry of references.bib: key -> dict of its fields."
    text = BIB.read_text(encoding="utf-8")
    field = re.compile(r"^\s*(\w+) = \{(.*?)\},?$", re.M)
    return {key: {k: re.sub("[{}]", "", v) for k, v in field.findall(body)}
            for key, body in re.findall(r"^@\w+\{([\w-]+),\n(.*?)^\}", text, re.S | re.M)}


def who(ref):
    "The authors' family names as Chicago style shortens them: `Ho, Jain, and Abbeel`, `Hang et al.`"
    names = [a.split(",")[0] for a in ref["author"].split(" and ")]
    if len(names) > 3: return f"{names[0]} et al."
    if len(names) == 3: return f"{names[0]}, {names[1]}, and {names[2]}"
    return " and ".join(names)


def full(ref):
    "One reference as a line of Markdown."
    authors = ref["author"].replace(" and ", "; ")
    where = ref.get("booktitle") or ref.get("journal") or ref.get("school")
    link = f" <{ref['url']}>" if "url" in ref else ""
    note = f" {ref['note']}." if "note" in ref else ""
    return f"{authors}. {ref['year']}. “{ref['title']}.” *{where}*.{note}{link}"


def outside_code(function, text):
    "Apply `function` to the parts of a Markdown text that are no code."
    parts = CODE.split(text)
    return "".join(part if i % 2 else function(part) for i, part in enumerate(parts))


def cited(text, refs):
    "The keys a Markdown text cites, in order: known or not inside brackets, known ones elsewhere."
    keys = []
    def look(part):
        for group in GROUP.findall(part): keys.extend(re.findall(r"@([\w-]+)", group))
        keys.extend(k for k in BARE.findall(GROUP.sub("", part)) if k in refs)
        return part
    outside_code(look, text)
    return list(dict.fromkeys(keys))


def write(text, refs, link):
    "Replace the citations of a Markdown text; `link(key)` gives the address of a reference, or None."
    def linked(key, label): return f"[{label}]({link(key)})" if link(key) else label

    def item(m):
        known = ', '.join(refs)
        if m["key"] not in refs: raise ValueError(f"@{m['key']} is not in {BIB.name}; its keys: {known}")
        return m["before"] + linked(m["key"], f"{who(refs[m['key']])} {refs[m['key']]['year']}") + m["after"]

    def group(m):
        rest = ITEM.sub("", m[1]).strip("; ")  # pandoc wants a key between any two semicolons
        if rest: raise ValueError(f"[{m[1]}]: `{rest}` cites nothing")
        return "(" + ITEM.sub(item, m[1]) + ")"

    def bare(m):
        if m[1] not in refs: return m[0]
        return linked(m[1], f"{who(refs[m[1]])} ({refs[m[1]]['year']})")

    return outside_code(lambda part: BARE.sub(bare, GROUP.sub(group, part)), text)
