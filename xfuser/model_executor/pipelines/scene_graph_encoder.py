"""The graph encoder of SGDiff (arXiv 2211.11138): graph convolutions over triples, and tokens for cross-attention."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from diffusers import ConfigMixin, ModelMixin
from diffusers.configuration_utils import register_to_config
from torch import nn

from xfuser.model_executor.pipelines.scene_graphs import Vocabulary


class TripleConvolution(nn.Module):
    """One graph convolution: a perceptron over each triple, its answers to a node averaged (arXiv 1804.01622)."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.width = width
        self.of_triples = nn.Sequential(nn.Linear(3 * width, 2 * width), nn.ReLU(), nn.Linear(2 * width, 3 * width))
        self.of_nodes = nn.Sequential(nn.Linear(width, width), nn.ReLU(), nn.Linear(width, width))

    def forward(
        self, nodes: torch.Tensor, edges: torch.Tensor, subjects: torch.Tensor, others: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Update nodes [N, O, W] and edges [N, R, W]; subjects and others [N, R, O] say whose the triples are."""
        triples = torch.cat([subjects @ nodes, edges, others @ nodes], dim=2)
        to_subject, to_edge, to_other = self.of_triples(triples).split(self.width, dim=2)
        counts = (subjects + others).sum(dim=1).clamp(min=1)[..., None]
        heard = subjects.transpose(1, 2) @ to_subject + others.transpose(1, 2) @ to_other
        return nodes + self.of_nodes(heard / counts), edges + to_edge


class SceneGraphEncoder(ModelMixin, ConfigMixin):
    """Encodes scene graphs of names into tokens: one a triple and one an object (local), and one a graph (global).

    A triple's token is its subject's, predicate's and object's states side by side. Tokens of what is not there are
    zero, and so are all tokens of no graph, which guidance compares with.
    """

    @register_to_config
    def __init__(
        self,
        objects: Sequence[str],
        predicates: Sequence[str],
        most_objects: int = 5,
        most_relations: int = 6,
        width: int = 64,
        num_layers: int = 3,
    ) -> None:
        super().__init__()
        self.object_embedding = nn.Embedding(len(objects), width)
        self.predicate_embedding = nn.Embedding(len(predicates), width)
        self.convolutions = nn.ModuleList(TripleConvolution(width) for _ in range(num_layers))
        self.node_norm, self.edge_norm = nn.LayerNorm(width), nn.LayerNorm(width)
        self.of_node = nn.Linear(width, 3 * width)
        self.of_graph = nn.Linear(2 * width, 3 * width)

    @property
    def vocabulary(self) -> Vocabulary:
        """What graphs may say."""
        return Vocabulary.of(self.config)

    def numbers_of(self, graphs: Sequence[Mapping[str, Any] | None]) -> torch.Tensor:
        """Number what checked graphs say, int64 [N, objects + 3 x relations], -1 for what is not there."""
        most_objects, most_relations = self.config.most_objects, self.config.most_relations
        numbers = torch.full((len(graphs), most_objects + 3 * most_relations), -1)
        for row, graph in zip(numbers, graphs, strict=True):
            if graph is None:
                continue
            for place, name in enumerate(graph["objects"]):
                row[place] = self.config.objects.index(name)
            for place, (subject, predicate, other) in enumerate(graph["relations"]):
                start = most_objects + 3 * place
                row[start : start + 3] = torch.tensor([subject, self.config.predicates.index(predicate), other])
        return numbers

    def forward(self, numbers: torch.Tensor) -> torch.Tensor:
        """Encode what `numbers_of` gave: tokens [N, relations + objects + 1, 3 x width], the graph's at the end."""
        names, triples = numbers.split([self.config.most_objects, 3 * self.config.most_relations], dim=1)
        triples = triples.unflatten(1, (-1, 3))
        dtype = self.object_embedding.weight.dtype
        is_object, is_relation = (names >= 0).to(dtype)[..., None], (triples[..., 1] >= 0).to(dtype)[..., None]
        nodes = self.object_embedding(names.clamp(min=0)) * is_object
        edges = self.predicate_embedding(triples[..., 1].clamp(min=0)) * is_relation
        places = torch.arange(self.config.most_objects, device=numbers.device)
        subjects, others = ((triples[..., end, None] == places).to(dtype) for end in (0, 2))
        for convolution in self.convolutions:
            nodes, edges = convolution(nodes, edges, subjects, others)
        nodes, edges = self.node_norm(nodes) * is_object, self.edge_norm(edges) * is_relation
        local = torch.cat([subjects @ nodes, edges, others @ nodes], dim=2)
        counts = (each.sum(dim=1).clamp(min=1) for each in (is_object, is_relation))
        means = [each.sum(dim=1) / count for each, count in zip((nodes, edges), counts, strict=True)]
        there = is_object.amax(dim=1, keepdim=True)
        whole = self.of_graph(torch.cat(means, dim=1))[:, None] * there
        return torch.cat([local, self.of_node(nodes) * is_object, whole], dim=1)
