"""Signatures in the site's documentation, as Python writes them.

Imported before nbdev documents the notebooks, this takes the place of its renderer, which writes
`args:VAR_POSITIONAL`, leaves out the `*` before keywords, and guesses types from defaults.
"""
import inspect
import re

import nbdev.showdoc
from fastcore.docments import docments

EMPTY = inspect.Parameter.empty
STARS = {inspect.Parameter.VAR_POSITIONAL: "*", inspect.Parameter.VAR_KEYWORD: "**"}


def worded(annotation):
    "An annotation by its names, without their modules."
    name = annotation if isinstance(annotation, str) else inspect.formatannotation(annotation)
    return re.sub(r"\b(?:\w+\.)+(?=\w)", "", name).replace("NoneType", "None")


def written(parameter):
    "One parameter with its stars, annotation and default."
    text = STARS.get(parameter.kind, "") + parameter.name
    typed = parameter.annotation is not EMPTY
    if typed: text += f": {worded(parameter.annotation)}"
    if parameter.default is EMPTY: return text
    default = getattr(parameter.default, "__name__", None) or repr(parameter.default)
    return text + (f" = {default}" if typed else f"={default}")


def listed(parameters):
    "The parameters, with the bare `*` and `/` that their kinds ask for, and None for the comment of these."
    kinds = [p.kind for p in parameters]
    for i, p in enumerate(parameters):
        starred = {inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.KEYWORD_ONLY} & {*kinds[:i]}
        if p.kind is p.KEYWORD_ONLY and not starred: yield "*", None
        yield written(p), p.name
        last = p.kind is p.POSITIONAL_ONLY and kinds[i + 1:i + 2] != [p.kind]
        if last: yield "/", None


def comment(note):
    "A docment as a comment, without the marks of Markdown."
    return f"  # {' '.join(note.split()).replace('`', '')}" if note else ""


def parameters_of(thing):
    "The parameters that a call gives; none where a class has no `__init__` of its own, as a protocol."
    if inspect.isclass(thing):
        own = [c for c in thing.__mro__ if "__init__" in vars(c) and c.__module__ != "builtins"]
        if not own or getattr(thing, "_is_protocol", False): return []
    try: found = inspect.signature(thing).parameters.values()
    except (TypeError, ValueError): return []
    return [p for p in found if p.name not in ("self", "cls")]


def signature(thing, name):
    "The head of a function or class as it would stand in its code, with a comment beside each parameter."
    parameters = parameters_of(thing)
    notes = docments(thing, returns=True) if parameters or not inspect.isclass(thing) else {}
    rows = [(f"{text},", comment(notes.get(name))) for text, name in listed(parameters)]
    width = max((len(text) for text, note in rows if note and len(text) <= 40), default=0)
    body = "".join(f"\n    {text:<{width}}{note}".rstrip() for text, note in rows) + "\n" * bool(rows)
    if inspect.isclass(thing):
        above = [base.__name__ for base in thing.__bases__ if base.__name__ not in ("object", "Protocol")]
        return f"class {name}({body})" + f"  # a subclass of {', '.join(above)}" * bool(above)
    result = inspect.signature(thing).return_annotation
    arrow = f" -> {worded(result)}" if result is not EMPTY else ""
    return f"def {name}({body}){arrow}{comment(notes.get('return'))}"


class Renderer(nbdev.showdoc.BasicMarkdownRenderer):
    "What `show_doc` writes of a function or class."

    def _repr_markdown_(self):
        source = nbdev.showdoc.NbdevLookup().code(self.fn)
        link = f"[source]({source}){{.source-link}}\n\n" if source else ""
        docs = f"\n\n{self.docs}" if self.docs else ""
        text = signature(self.sym, self.nm.split(".")[-1])
        return f"---\n\n{link}{'#' * self.title_level} {self.nm}\n\n```python\n{text}\n```{docs}"


nbdev.showdoc.BasicMarkdownRenderer = Renderer
