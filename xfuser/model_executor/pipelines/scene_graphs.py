"""Scene graphs as people write them, in JSON, checked against what a model knows. Needs no torch."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from xfuser.config.spelling import did_you_mean

FORM = '{"objects": ["red apple", "banana"], "relations": [[0, "left of", 1]]}'


@dataclass(frozen=True)
class Vocabulary:
    """What the scene graphs of a model may say."""

    objects: tuple[str, ...]
    predicates: tuple[str, ...]
    most_objects: int
    most_relations: int

    @classmethod
    def of(cls, config: Mapping[str, Any]) -> Vocabulary:
        """Take it from a graph encoder's configuration."""
        counts = config["most_objects"], config["most_relations"]
        return cls(tuple(config["objects"]), tuple(config["predicates"]), *counts)

    def check(self, graph: Any) -> dict[str, Any]:
        """Check a graph; JSON text is read first.

        Returns:
            The graph: ``objects``, names, and ``relations``, [subject, predicate, object] with indices of objects.

        Raises:
            ValueError: It is no graph, or says what the model does not know.
        """
        if isinstance(graph, str):
            graph = parse(graph)
        if not isinstance(graph, Mapping) or set(graph) != {"objects", "relations"}:
            raise ValueError(f"not a scene graph: expected the keys objects and relations, as {FORM}")
        objects, relations = graph["objects"], graph["relations"]
        if not _is_list(objects) or not 1 <= len(objects) <= self.most_objects:
            raise ValueError(f"objects of a scene graph: expected a list of 1 to {self.most_objects} names")
        for name in objects:
            if name not in self.objects:
                raise ValueError(f"object {name!r} is not known{_near(name, self.objects)}")
        if len(set(objects)) < len(objects):
            twice = next(name for name in objects if list(objects).count(name) > 1)
            raise ValueError(f"object {twice!r} is named twice; name each object once")
        if not _is_list(relations) or len(relations) > self.most_relations:
            raise ValueError(f"relations of a scene graph: expected a list of at most {self.most_relations}")
        for relation in relations:
            self._check_relation(relation, len(objects))
        return {"objects": list(objects), "relations": [list(relation) for relation in relations]}

    def _check_relation(self, relation: Any, count: int) -> None:
        if not _is_list(relation) or len(relation) != 3:
            raise ValueError(f'relation {relation!r}: expected [subject, predicate, object], as [0, "left of", 1]')
        subject, predicate, other = relation
        if predicate not in self.predicates:
            raise ValueError(f"predicate {predicate!r} is not known{_near(predicate, self.predicates)}")
        for index in (subject, other):
            if isinstance(index, bool) or not isinstance(index, int) or not 0 <= index < count:
                raise ValueError(f"relation {relation!r}: {index!r} is no object's index; there are 0 to {count - 1}")
        if subject == other:
            raise ValueError(f"relation {relation!r}: subject and object are the same; name two")


def _is_list(value: Any) -> bool:
    return isinstance(value, Sequence) and not isinstance(value, str)


def _near(name: Any, known: Sequence[str]) -> str:
    meant = did_you_mean(name, known) if isinstance(name, str) else ""
    return f"{meant or ';'} known are {', '.join(known)}"


def parse(text: str) -> Any:
    """Read JSON text (ValueError where it is none)."""
    try:
        return json.loads(text)
    except ValueError as error:
        raise ValueError(f"not a scene graph: {error}; expected JSON, as {FORM}") from error


def vocabulary_of(model: Path | str | None) -> Vocabulary | None:
    """Read what a model's graphs may say, before any weight is read; ``None`` where it is in no folder here."""
    path = Path(model or "") / "graph_encoder" / "config.json"
    return Vocabulary.of(json.loads(path.read_text(encoding="utf-8"))) if path.is_file() else None


def read_graph_files(paths: Sequence[Path]) -> list[str]:
    """Read files that hold a graph, or a list of graphs, each; every graph as JSON text.

    Raises:
        ValueError: One cannot be read, or holds none.
    """
    texts = []
    for path in paths:
        try:
            document = parse(path.read_text(encoding="utf-8"))
        except OSError as error:
            raise ValueError(f"--scene_graph {path}: it cannot be read ({error.strerror})") from error
        except ValueError as error:
            raise ValueError(f"--scene_graph {path}: {error}") from error
        graphs = document if isinstance(document, list) else [document]
        if not graphs:
            raise ValueError(f"--scene_graph {path}: it holds no graph; expected one, as {FORM}, or a list of them")
        texts += [json.dumps(graph) for graph in graphs]
    return texts
