"""Classes by name, for the pipelines."""

import difflib
from collections.abc import Sequence

from torch import Tensor

from nsvq.autoregressive.sampling import as_list


class ClassNames:
    """`id2label`: {class id: name}; `null_class`: the id that means "no class"."""

    id2label: dict[int, str]
    null_class: int

    def class_ids(self, class_labels: int | str | Sequence[int | str | None] | Tensor | None) -> list[int]:
        """Ids of classes given by id, by whole name or by one of a name's comma-separated synonyms; None is "no class".

        Raises `ValueError` where there is no such class, or several.
        """
        return [self._class_id(label) for label in as_list(class_labels)]

    def _class_id(self, label: int | str | None) -> int:
        if label is None:
            return self.null_class
        if not isinstance(label, str):
            if label not in self.id2label:
                raise ValueError(f"class {label} does not exist: {self._classes()}")
            return int(label)
        wanted = label.strip().lower()
        synonyms: dict[str, list[int]] = {}
        for i, name in self.id2label.items():
            for word in name.lower().split(","):
                synonyms.setdefault(word.strip(), []).append(i)
        whole = [i for i, name in self.id2label.items() if name.strip().lower() == wanted]
        found = whole or synonyms.get(wanted, [])
        if len(found) > 1:
            raise ValueError(f"{label!r} is the name of classes {', '.join(map(str, found))}: give the id")
        if not found:
            near = difflib.get_close_matches(wanted, synonyms, n=3)
            near += [word for word in synonyms if wanted in word and word not in near][: 3 - len(near)]
            hint = f"did you mean {' or '.join(map(repr, near))}?" if near else self._classes()
            raise ValueError(f"class {label!r} does not exist: {hint}")
        return found[0]

    def _classes(self) -> str:
        """The classes there are, in short."""
        shown = [f"{i} ({name})" for i, name in self.id2label.items()]
        return "there are " + (", ".join(shown if len(shown) <= 4 else [*shown[:2], "...", shown[-1]]) or "none")
