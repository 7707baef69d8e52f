"""`Rank1EditModule`: a projection with key-locked rank-1 edits (Perfusion, sections 3 and 4)."""

from collections.abc import Callable

import torch
from torch import Tensor, nn

from perfusion_pytorch.arguments import beartype
from perfusion_pytorch.layers.averages import advance_
from perfusion_pytorch.layers.batch_cache import BatchCache
from perfusion_pytorch.layers.checks import (
    check_text_enc,
    check_weight,
    checked_covariance,
    plain_concept_id,
    trained_concept,
    warn_if_parallel,
)
from perfusion_pytorch.layers.covariance import InputCovariance
from perfusion_pytorch.layers.functional import add_product
from perfusion_pytorch.layers.inference import ConceptId, PreparedEdits, inference_split
from perfusion_pytorch.layers.options import LAYER_DEFAULTS, check_layer_options
from perfusion_pytorch.layers.precision import kept_in_float32, without_autocast
from perfusion_pytorch.layers.recomputation import RecentCall, RecentCalls, is_recomputation
from perfusion_pytorch.layers.training_batch import TrainingBatch
from perfusion_pytorch.layers.training_call import SplitOptions, TrainingCall, split_of_call
from perfusion_pytorch.layers.wrapped import WrappedProjection

SplitFunction = Callable[[Tensor, TrainingCall, SplitOptions], tuple[Tensor, Tensor]]
AVERAGED = ("concept_input", "superclass_input", "concept_dual")
KEPT_IN_FLOAT32 = (*AVERAGED, "eval_beta", "eval_temperature", "concept_output")


class Rank1EditModule(WrappedProjection):
    """A frozen key or value projection whose forward carries key-locked rank-1 edits.

        h(e) = W (e − Σⱼ iⱼ r̃ⱼ(e)) + Σⱼ oⱼ* σ((rⱼ(e) − βⱼ) / τⱼ)   (Perfusion, eq. 3 and appendix B)

    In the gated form (`gates_removal`) the gate closes the whole edit: a token whose gate is shut gets W e.

        h(e) = W e + Σⱼ σ((rⱼ(e) − βⱼ) / τⱼ) (oⱼ* − W iⱼ r̃ⱼ(e))

    Keys: o* is locked to W s, the projection of the superclass. Values: o* is the parameter `concept_output`,
    learned from W s on. Until a concept has been seen in training, or loaded, the layer returns exactly what
    the wrapped projection does.

    The layer takes over the projection's own weight and bias and freezes them. It is an `nn.Linear` with
    the same state-dict keys, so LoRA and checkpoints work on it as on the layer it replaces. Axes: b batch,
    n tokens, c concepts, p prompt slots, d input features, o output features.

    Args:
        key_or_values_proj: the projection to wrap.
        C: the input covariance, shape (d, d), or an `InputCovariance` that many layers share; needed only
            for training.
        is_key_proj: True for keys, whose output is locked; False for values.
        num_finetune_prompts: p, slots for per-prompt statistics.
        num_concepts: c.
        text_seq_len: if given, text encodings must have this many tokens.
        input_decay: δ of the moving averages i* ← δ i* + (1 − δ) mean, in [0, 1).
        train_beta: gate bias in training calls; dimensionless, 1.0 is the concept itself.
        train_temperature: gate temperature in training calls, above 0.
        eval_beta: gate bias elsewhere, for all concepts. The buffer of this name, shape (c,), holds one for
            each.
        eval_temperature: gate temperature elsewhere; its buffer likewise.
        frac_gradient_concept_embed: in [0, 1], scales the gradient that flows from training calls into the
            text encoder.
        gates_removal: whether the concepts have the gated form; a tuple of c bools if they differ.

    Raises:
        ValueError: the projection is not a plain `nn.Linear`, or an option is out of its range. For errors
            of the covariance, see `InputCovariance`.

    Example:
        >>> to_values = nn.Linear(8, 16, bias=False)
        >>> wrapped = Rank1EditModule(to_values, C=torch.eye(8))
        >>> text_enc = torch.randn(2, 5, 8)
        >>> torch.equal(wrapped(text_enc), to_values(text_enc))
        True
        >>> wrapped(text_enc, torch.randn(2, 5, 8), torch.tensor([1, 3])).shape
        torch.Size([2, 5, 16])
        >>> torch.equal(wrapped.eval()(text_enc), to_values(text_enc))
        False
    """

    concept_input: Tensor  # i*, (c, p, d)
    superclass_input: Tensor  # s, (c, p, d)
    initialized: Tensor  # (c, p), bool: slots that a training call has seen
    concept_dual: Tensor  # (c, d)
    eval_beta: Tensor  # (c,)
    eval_temperature: Tensor  # (c,)
    removal_is_gated: Tensor  # (c,), bool: `gates_removal`
    concept_output: nn.Parameter  # o*, (c, o); value layers only

    @beartype
    def __init__(
        self,
        key_or_values_proj: nn.Module,
        *,
        C: Tensor | InputCovariance | None = None,
        is_key_proj: bool = False,
        num_finetune_prompts: int = 1,
        num_concepts: int = 1,
        text_seq_len: int | None = None,
        input_decay: float | int = LAYER_DEFAULTS.input_decay,
        train_beta: float | int = LAYER_DEFAULTS.train_beta,
        train_temperature: float | int = LAYER_DEFAULTS.train_temperature,
        eval_beta: float | int = LAYER_DEFAULTS.eval_beta,
        eval_temperature: float | int = LAYER_DEFAULTS.eval_temperature,
        frac_gradient_concept_embed: float | int = LAYER_DEFAULTS.frac_gradient_concept_embed,
        gates_removal: bool | tuple[bool, ...] = False,
    ):
        proj = key_or_values_proj
        if type(proj) is not nn.Linear:
            raise ValueError(
                f"`key_or_values_proj` must be a plain nn.Linear, got {type(proj).__name__}. "
                "Wrapped layers cannot be wrapped again; for a LoRA layer, wrap its `base_layer`; "
                "quantised layers are not supported."
            )
        check_weight("key_or_values_proj", proj)
        check_layer_options(
            num_finetune_prompts=num_finetune_prompts,
            num_concepts=num_concepts,
            input_decay=input_decay,
            text_seq_len=text_seq_len,
            train_beta=train_beta,
            eval_beta=eval_beta,
            train_temperature=train_temperature,
            eval_temperature=eval_temperature,
            frac_gradient_concept_embed=frac_gradient_concept_embed,
        )
        forms = (gates_removal,) * num_concepts if isinstance(gates_removal, bool) else gates_removal
        if len(forms) != num_concepts:
            raise ValueError(
                f"`gates_removal` must be a bool, or one for each of {num_concepts} concepts, "
                f"got {gates_removal}."
            )
        covariance = None if C is None else checked_covariance(C, proj.in_features)

        super().__init__(proj, is_key_proj=is_key_proj)
        self.covariance = covariance
        self.num_finetune_prompts = num_finetune_prompts
        self.num_concepts = num_concepts
        self.text_seq_len = text_seq_len
        self.input_decay = input_decay
        self.train_beta = train_beta
        self.train_temperature = train_temperature
        self.frac_gradient_concept_embed = frac_gradient_concept_embed
        self.gates_removal = forms
        self._register_state(eval_beta, eval_temperature)

        self.batch_cache: BatchCache | None = None  # set within `concept_inputs`
        self.recent_calls = RecentCalls()
        self.prepared = PreparedEdits()
        self.register_load_state_dict_post_hook(warn_if_parallel)

    def _register_state(self, eval_beta: float, eval_temperature: float) -> None:
        """Register the buffers, and the parameter of a value layer, on the weight's device."""

        def zeros(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
            return torch.zeros(self.num_concepts, *shape, dtype=dtype, device=self.weight.device)

        slots, d = self.num_finetune_prompts, self.in_features
        self.register_buffer("concept_input", zeros(slots, d))
        self.register_buffer("superclass_input", zeros(slots, d))
        self.register_buffer("initialized", zeros(slots, dtype=torch.bool))
        self.register_buffer("concept_dual", zeros(d))
        self.register_buffer("eval_beta", zeros() + eval_beta)
        self.register_buffer("eval_temperature", zeros() + eval_temperature)
        # An option and not state, so it is not saved; on the device for layers whose concepts differ in it.
        gated = torch.tensor(self.gates_removal, device=self.weight.device)
        self.register_buffer("removal_is_gated", gated, persistent=False)
        if not self.is_key_proj:
            self.concept_output = nn.Parameter(zeros(self.out_features))

    def forward(
        self,
        text_enc: Tensor,
        text_enc_with_superclass: Tensor | None = None,
        concept_indices: Tensor | None = None,
        *,
        superclass_indices: Tensor | None = None,
        prompt_ids: Tensor | None = None,
        concept_id: int | tuple[int, ...] | None = None,
    ) -> Tensor:
        """Project text encodings, with the edits of the concepts.

        With `concept_indices` in training mode, or within `concept_inputs`, this is a training call. It
        moves the averages i* and s, sets `concept_output` to W s in its first call, and applies the
        training gate to rows with the concept. A recomputation by activation checkpointing moves nothing.
        Every other call is an inference call and changes nothing.

        Args:
            text_enc: e, shape (b, n, d).
            text_enc_with_superclass: see `TrainingBatch`, as for the next three.
            concept_indices: shape (b,).
            superclass_indices: shape (b,).
            prompt_ids: shape (b,).
            concept_id: at inference, the concepts to apply, by default all that were trained; in training,
                the one that is trained, by default 0.

        Returns:
            Keys or values, shape (b, n, o), with the dtype that the plain projection would return.

        Raises:
            ValueError: a shape, position or id does not fit.
            RuntimeError: training without a covariance, or a recomputation whose inputs are no longer known.
        """
        check_text_enc(self, text_enc)
        if not isinstance(concept_id, int | tuple | None):
            concept_id = plain_concept_id(concept_id)
        if concept_indices is None and text_enc_with_superclass is not None:
            raise ValueError(
                "`concept_indices` must be given along with `text_enc_with_superclass`, got None."
            )
        is_training_call = concept_indices is not None or self.batch_cache is not None
        if not self.training or (not is_training_call and torch.compiler.is_compiling()):
            return self._inference_output(text_enc, concept_id)
        batch = None
        if concept_indices is not None:
            trained_id = trained_concept(concept_id)
            batch = TrainingBatch(
                text_enc_with_superclass, concept_indices, superclass_indices, prompt_ids, trained_id
            )
        call, split = self._training_call(text_enc, batch)
        if call is None:
            return self._inference_output(text_enc, concept_id)
        options = SplitOptions(
            self.train_beta,
            self.train_temperature,
            self.frac_gradient_concept_embed,
            self.gates_removal[call.concept_id],
        )
        with without_autocast(text_enc):
            rest, gate = split(text_enc, call, options)
            output = (
                call.of_rows(call.superclass_input)
                if self.is_key_proj
                else self.concept_output[call.concept_id].unsqueeze(0)
            )
        return self._project_edited(text_enc.dtype, rest, gate, output.to(rest.dtype))

    def _training_call(
        self, text_enc: Tensor, batch: TrainingBatch | None
    ) -> tuple[TrainingCall | None, SplitFunction]:
        """Return the constants of a call in training mode, and the function that splits its encodings.

        The constants are None if this is an inference call. A recomputed call gets those that it had in
        forward; every other one moves the averages.
        """
        if is_recomputation():
            return self.recent_calls.recomputed(text_enc, batch), split_of_call
        cache = self.batch_cache if batch is None else BatchCache(batch)
        if cache is None:
            self.recent_calls.append(RecentCall(text_enc.detach(), None, None))
            return None, split_of_call
        if batch is not None:
            batch.check_fits(self, text_enc.shape[-2])
        with without_autocast(text_enc):  # averages in bfloat16 would lose what one call adds
            means = cache.means(text_enc, self.num_finetune_prompts)
            call = advance_(self, means, cache.batch.concept_id)
        self.recent_calls.append(RecentCall(means.text_enc, cache.request, call))
        return call, cache.split

    def _inference_output(self, text_enc: Tensor, concept_id: ConceptId) -> Tensor:
        flat = text_enc.flatten(0, -2)  # products of matrices are fewer operations than of batches of them
        rest, gate, output = inference_split(self, flat, concept_id)
        projected = self._project_edited(text_enc.dtype, rest, gate, output)
        return projected.view(*text_enc.shape[:-1], -1)

    def _project_edited(self, dtype: torch.dtype, rest: Tensor, gate: Tensor, output: Tensor) -> Tensor:
        """Return W rest + gate · output, with the bias added once.

        For keys, `output` is s and is added before W, because o* = W s; this spares a product. For values
        it is o*.

        Args:
            dtype: of the text encodings; the result has the dtype that the plain projection has for these.
            rest: shape (b, n, d).
            gate: shape (b, n, c).
            output: shape (c, d) for keys, (c, o) for values; or (b, 1, d) if each row has its own s.
        """
        if self.is_key_proj:
            with without_autocast(rest):
                rest = add_product(rest, gate, output)
            return super().forward(rest.to(dtype))
        projected = super().forward(rest.to(dtype))
        with without_autocast(rest):
            if projected.dtype == rest.dtype:
                return add_product(projected, gate, output)
            return projected + (gate @ output).to(projected.dtype)

    def check_concept_id(self, concept_id: ConceptId) -> None:
        """Check that ids are different concepts of this layer.

        Raises:
            ValueError: an id is out of range, or is given twice.
        """
        if concept_id is None:
            return
        ids = (concept_id,) if isinstance(concept_id, int) else concept_id
        if len(set(ids)) != len(ids) or not all(0 <= i < self.num_concepts for i in ids):
            raise ValueError(
                f"`concept_id` must be different concepts from 0 to {self.num_concepts - 1}, "
                f"got {concept_id}."
            )

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> "Rank1EditModule":
        """Convert as every module does, but keep what is averaged or learned in float32."""
        with kept_in_float32(self, KEPT_IN_FLOAT32):
            return super()._apply(fn, recurse)

    def extra_repr(self) -> str:
        """Return what `repr` shows: the linear layer's sizes, and kind and numbers of slots and concepts."""
        options = (
            f"{name}={getattr(self, name)}"
            for name in ("is_key_proj", "num_finetune_prompts", "num_concepts")
        )
        return ", ".join([super().extra_repr(), *options])
