"""Backbone: a frozen pretrained transformer, its blocks, and the sites where adapters can sit."""

from __future__ import annotations

import hashlib
import html
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig
from peft.utils.transformers_weight_conversion import convert_peft_config_for_transformers
from torch import nn
from transformers import AutoModelForSequenceClassification, PreTrainedModel

from autopeft.core.adapter import Place, Site, block_ranges, place_name, role_order
from autopeft.core.configuration import Configuration
from autopeft.core.method_specs import METHOD_SPECS, PeftSpec
from autopeft.core.precision import Precision, autocast
from autopeft.core.tables import as_text, titled_table
from autopeft.models.block_discovery import find_blocks
from autopeft.models.cached_casts import CachedCasts
from autopeft.models.head_layers import last_layer, output_layer
from autopeft.models.head_spec import HeadPart, HeadSpec, Processor
from autopeft.models.loading import LoadOptions, empty_model, head_modules, load_model
from autopeft.models.quantized_layers import keep_as_loaded
from autopeft.models.site_shapes import SiteShape, all_sites
from autopeft.models.spread import devices_of, keep_spread


class Backbone:
    """A frozen pretrained transformer with the task's head, kept in memory for a whole search.

    Args:
        model: A transformers model with a head. Its weights are never changed: adapters are attached
            and detached in place, and the head is trained in a copy.
        processor: What makes its inputs of data, as a tokenizer; None where the task needs none.
        name: How tables and runs call it.
        head: Qualified names of the modules that are the task's; none where the model's own head stays
            frozen.
        new_head: Whether the head's weights are random (they are then drawn anew for every seed).
        auto_class: The transformers auto class that loads the model with its head.
        origin: Hub name or folder it can be loaded from again; empty where that is not known.

    Attributes:
        quantized: Bits of the weights that bitsandbytes packed, 4 or 8, by the layer's name.
        cached_casts: Puts the linear sites' weights in place as mixed precision multiplies them.
        load_again: Loads it for a `device`, as another process has one; None where no name or folder was
            given.
        head_part: What of the head is trained, see `train_head`.
        trained_head: Qualified names of the head's modules that are trained.
        head_parameters: Number of their parameters; trained with every configuration.
        kept_bytes: Bytes of a pretrained output layer that stay in memory beside the copy that is trained.

    Raises:
        ValueError: No block was found, a head module does not exist, quantised weights were rearranged for
            inference, or a `device_map` has spread the model in a way that it cannot be trained in.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        processor: Processor | None,
        *,
        name: str,
        head: Iterable[str],
        new_head: bool = True,
        auto_class: Any = AutoModelForSequenceClassification,
        origin: str = "",
    ) -> None:
        self.model = model
        self.processor: Any = processor  # of the class that the task's head names
        self.name = name
        self.head = self._task_head = tuple(head)
        self.auto_class = auto_class
        self.new_head = new_head and bool(self._task_head)
        self.origin = origin
        self.attached: Configuration | None = None
        self.load_again: Callable[..., Backbone] | None = None
        modules = dict(model.named_modules())
        missing = [name for name in self.head if name not in modules]
        if missing:
            raise ValueError(
                f"{type(model).__name__} has no head module {', '.join(missing)}: "
                "pass a model with a task head, or the name of one that autopeft can load."
            )
        model.requires_grad_(False)
        _leave_out_chance(model)
        self.train_head("whole")
        self.quantized = keep_as_loaded(model)
        self._block_modules = find_blocks(model)
        keep_spread(model, (block.name for block in self._block_modules))
        self.sites: Mapping[Site, SiteShape] = all_sites(model, self._block_modules)
        names = (shape.module for shape in self.sites.values() if shape.kind == "linear")
        self.cached_casts = CachedCasts(map(model.get_submodule, names))  # before anything is put around them

    @classmethod
    def load(
        cls,
        source: str | Path | PreTrainedModel | Backbone,
        head: HeadSpec,
        processor: Processor | None = None,
        *,
        options: LoadOptions | None = None,
        device: torch.device | None = None,
    ) -> Backbone:
        """Load a backbone with the head a task needs.

        Args:
            source: Hub name, local folder, a loaded transformers model (with or without a head), or a
                backbone, which is returned as it is.
            head: The task's, as in `task.head`.
            processor: Needed where a loaded model does not say where the one lies that the task needs.
            options: How weights are loaded, of a name or a folder; by default as they are stored.
            device: Where the model will compute; the CPU by default.

        Raises:
            ValueError: The source cannot be loaded, or a loaded model's head does not fit.
        """
        (options or LoadOptions()).check_for(source)
        if isinstance(source, Backbone):
            return source
        backbone = cls(**load_model(source, head, processor, options, device))
        if isinstance(source, str | Path):
            backbone.load_again = partial(cls.load, source, head, processor, options=options)
        return backbone

    @classmethod
    def without_weights(cls, source: str | Path, head: HeadSpec, *, dtype: torch.dtype) -> Backbone:
        """Build a backbone from its config alone, on torch's meta device: it can be counted, not run.

        Args:
            source: Hub name, or a folder with a config.json.
            head: The task's, as in `task.head`.
            dtype: Of the weights.

        Raises:
            ValueError: There is no such config, or transformers has no such model for the task.
        """
        model, name = empty_model(source, head, dtype)
        modules = head_modules(model, head)
        return cls(
            model,
            None,
            name=name,
            head=modules,
            auto_class=head.auto_class,
            new_head=False,
            origin=str(source),
        )

    def train_head(self, part: HeadPart) -> None:
        """Train the whole head, its last layer alone, or the output layer that a language model came with.

        What of a head is not trained stays as it is drawn or was loaded.

        Raises:
            ValueError: No layer of the head has an output a label, or the model has no output layer that can
                be trained apart from its other weights.
        """
        self.head_part, self.head = part, self._task_head
        if part == "pretrained":
            self.head = (output_layer(self.model, self._task_head, self.quantized),)
        self.trained_head = self.head
        if part == "last":
            self.trained_head = (last_layer(self.model, self.head),)
        trained = map(self.model.get_submodule, self.trained_head)
        parameters = {parameter for module in trained for parameter in module.parameters()}
        self.head_parameters = sum(parameter.numel() for parameter in parameters)
        self.kept_bytes = sum(each.nbytes for each in parameters) if part == "pretrained" else 0

    def enable_checkpointing(self) -> None:
        """Compute activations again in the backward pass instead of keeping them."""
        if not self.model.supports_gradient_checkpointing:
            raise ValueError(f"{type(self.model).__name__} cannot compute its activations again.")
        # The second name is that of transformers before 5.20.
        enable = getattr(self.model, "activation_checkpointing_enable", None)
        (enable or self.model.gradient_checkpointing_enable)({"use_reentrant": False})

    @property
    def blocks(self) -> tuple[nn.Module, ...]:
        """The transformer blocks, stack after stack, from the input to the output."""
        return tuple(self.model.get_submodule(block.name) for block in self._block_modules)

    @cached_property
    def places(self) -> tuple[Place, ...]:
        """The stack of each block, and its index there."""
        return tuple(block.place for block in self._block_modules)

    @cached_property
    def stacks(self) -> Mapping[str, tuple[Place, ...]]:
        """The places of each stack's blocks, by its name; the only one of a model has none."""
        return {
            stack: tuple(place for place in self.places if place[0] == stack)
            for stack in dict.fromkeys(stack for stack, _ in self.places)
        }

    @cached_property
    def depths(self) -> Mapping[str, int]:
        """Number of blocks of each stack."""
        return {stack: len(places) for stack, places in self.stacks.items()}

    @property
    def hidden_size(self) -> int:
        """Width of the hidden states; the largest where stages differ."""
        return max(block.width for block in self._block_modules)

    def blocks_below(self, place: Place | None) -> int:
        """Return how many blocks run before one, those of the stacks before it included; all before None."""
        return len(self.places) if place is None else self.places.index(place)

    @property
    def devices(self) -> tuple[torch.device, ...]:
        """Where it lies; the first is where it takes its inputs."""
        return devices_of(self.model)

    @property
    def own_precision(self) -> Precision:
        """What it computes in: below single precision, under autocast, as adapters are in float32."""
        return "bf16-mixed" if self.model.dtype.itemsize < 4 else "32-true"

    @contextmanager
    def computing_in(self, precision: Precision) -> Iterator[None]:
        """Compute in a precision in a `with` block: under autocast, with frozen weights cast beforehand."""
        device = next(self.model.parameters()).device
        with self.cached_casts.in_place(precision), autocast(precision, device.type):
            yield

    @property
    def roles(self) -> tuple[str, ...]:
        """The roles that occur, in the vocabulary's order."""
        present = {site.role for site in self.sites}
        return tuple(sorted(present, key=lambda role: (role_order(role), role)))

    @cached_property
    def parameters(self) -> int:
        """Number of parameters of backbone and head together."""
        return self.model.num_parameters()  # 4-bit weights by the numbers they stand for

    def shape(self, site: Site) -> SiteShape:
        """Return what the backbone has at a site.

        Raises:
            ValueError: There is no such site; the message lists the roles and blocks there are.
        """
        if site in self.sites:
            return self.sites[site]
        block = place_name(site.place)
        if site.place not in self.places:
            raise ValueError(
                f"{self.name} has no block {block} (site {site}): its {len(self.places)} blocks are numbered "
                f"{block_ranges(self.places)}."
            )
        present = [there.role for there in sorted(self.sites) if there.place == site.place]
        raise ValueError(
            f"{self.name} has nothing in the role {site.role!r} in block {block}; "
            f"it has {', '.join(present)}."
        )

    @cached_property
    def has_attention_interface(self) -> bool:
        """Whether attention goes through transformers' attention interface, with SDPA available."""
        if not self.model.is_backend_compatible():
            return False
        try:
            return self.model.get_correct_attn_implementation("sdpa") == "sdpa"
        except (ValueError, ImportError):
            return False

    @cached_property
    def taken_for_experts(self) -> frozenset[str]:
        """Names of linear layers that peft's LoRA takes for experts, which had layers in transformers 4."""
        names = {shape.module for shape in self.sites.values() if shape.kind == "linear"}
        config = LoraConfig(target_modules=sorted(names))
        convert_peft_config_for_transformers(config, self.model, None)
        return frozenset(names - {*(config.target_modules or ())})

    def obstacle(self, shape: SiteShape, method: str) -> str | None:
        """Say why a method cannot sit on a site, or return None where it can."""
        specification = METHOD_SPECS[method]
        if shape.kind not in specification.kinds:
            return f"it is a {shape.kind} site"
        if specification.needs_bias and not shape.bias:
            return f"{shape.module} has no bias"
        if specification.needs_bias and shape.module in self.quantized:
            return f"bitsandbytes casts the bias of {shape.module}, which it quantised"
        if specification.is_lora and shape.module in self.taken_for_experts:
            return f"peft takes {shape.module} for an expert"
        if specification.needs_attention_interface and not self.has_attention_interface:
            return (
                f"{type(self.model).__name__} does not compute attention through transformers' "
                "attention interface with SDPA"
            )
        return None

    def check(self, configuration: Configuration) -> None:
        """Raise a ValueError where a configuration names a site or a method this backbone cannot carry."""
        for site, adapter in configuration:
            shape = self.shape(site)
            obstacle = self.obstacle(shape, adapter.method)
            if obstacle is not None:
                raise ValueError(f"{adapter.method!r} cannot sit on {site} of {self.name}: {obstacle}.")

    @cached_property
    def fingerprint(self) -> str:
        """SHA-256 (hex) over the architecture and every weight: tells backbones apart, in about 1 s a GB.

        The task's head is left out: it is trained anyway, and a new one would differ from process to process.
        """
        digest = hashlib.sha256(type(self.model).__name__.encode())
        heads = tuple(f"{head}." for head in self._task_head)
        for name, parameter in self.model.named_parameters():
            if name.startswith(heads):
                continue
            digest.update(f"{name}{tuple(parameter.shape)}{parameter.dtype}".encode())
            digest.update(parameter.detach().cpu().flatten().view(torch.uint8).numpy().data)
        return digest.hexdigest()

    def identity(self) -> dict[str, str]:
        """Return what tells this backbone from others, as text (for run records)."""
        return {
            "name": self.name,
            "class": type(self.model).__name__,
            "model_type": str(getattr(self.model.config, "model_type", "")),
            "blocks": ", ".join(f"{count} {stack}".strip() for stack, count in self.depths.items()),
            "parameters": str(self.parameters),
            "head": ", ".join(self.head),
            "fingerprint": self.fingerprint,
        }

    def summary(self) -> str:
        """Return the roles as text, a row each, with blocks, shapes and the methods it takes."""
        headings = ("role", "kind", "blocks", "module", "shape", "methods")
        table = titled_table(repr(self), headings, words=headings)
        for role in self.roles:
            shapes = [shape for site, shape in self.sites.items() if site.role == role]
            first = shapes[0]
            # Which families of peft's fit depends on sizes: `autopeft methods` has them.
            alone = [name for name, known in METHOD_SPECS.items() if not isinstance(known, PeftSpec)]
            methods = [name for name in alone if not self.obstacle(first, name)]
            sizes = sorted({f"{shape.in_features} → {shape.out_features}" for shape in shapes})
            table.add_row(
                role,
                first.kind,
                block_ranges(shape.site.place for shape in shapes),
                first.target.removeprefix(
                    f"{self._block_modules[self.blocks_below(first.site.place)].name}."
                ),
                ", ".join(sizes),
                ", ".join(methods) or "–",
            )
        left_out = sorted({leaf for block in self._block_modules for leaf in block.unrecognised})
        note = f"\nLinear layers without a role: {', '.join(left_out)}" if left_out else ""
        return as_text(table) + note

    def __repr__(self) -> str:
        counts = [f"{count} {stack}".strip() for stack, count in self.depths.items()]
        left_out = f", without sites: {', '.join(self.left_out)}" if self.left_out else ""
        return (
            f"Backbone({self.name!r}, {type(self.model).__name__}, "
            f"{' and '.join(counts)} blocks, {self.parameters:,} parameters{left_out})"
        )

    def _repr_html_(self) -> str:
        return f"<pre>{html.escape(self.summary())}</pre>"

    @cached_property
    def left_out(self) -> tuple[str, ...]:
        """Modules beside several stacks, as a projector from one to the other, that have linear layers."""
        if len(self.stacks) == 1:
            return ()
        inside = tuple(f"{name}." for name in (*self.head, *(block.name for block in self._block_modules)))
        output = self.model.get_output_embeddings()
        names = [
            name
            for name, module in self.model.named_modules()
            if isinstance(module, nn.Linear) and module is not output and not name.startswith(inside)
        ]
        return tuple(name for name in names if name not in self.head)


def _leave_out_chance(model: nn.Module) -> None:
    """Turn off what speech models do to their inputs and blocks at random, by NumPy's global generator too.

    A training that goes on where it paused would differ, and a step's memory would not be known beforehand.
    """
    config: Any = getattr(model, "config", None)
    for name, value in (("apply_spec_augment", False), ("layerdrop", 0.0)):
        if hasattr(config, name):
            setattr(config, name, value)
    # Else the first layers are given inputs that require gradients, and compute all theirs in vain.
    if (freeze := getattr(model, "freeze_feature_encoder", None)) is not None:
        freeze()
