"""`Rank1EditModule`: a key or value projection with key-locked rank-1 edits applied in its forward (Perfusion, sections 3 and 4)."""

import torch
import torch.nn.functional as F
from beartype import beartype
from torch import Tensor, nn

from perfusion_pytorch.covariance import InputCovariance
from perfusion_pytorch.functional import concept_dual, rank1_edit_delta
from perfusion_pytorch.precision import kept_in_float32
from perfusion_pytorch.training_call import ConceptInputs, RecentCalls, TrainingCall

KEPT_IN_FLOAT32 = ("concept_input", "superclass_input", "concept_dual", "eval_beta", "eval_temperature", "concept_output")


class Rank1EditModule(nn.Linear):
    """A frozen key or value projection whose forward carries key-locked rank-1 edits.

        h(e) = W e + Σⱼ oⱼ* σ((rⱼ(e) − βⱼ) / τⱼ) − W Σⱼ iⱼ r̃ⱼ(e)   (Perfusion, eq. 3 and appendix B; see `functional.py`)

    Keys: o* is locked to W s, the projection of the superclass. Values: o* is the parameter `concept_output`, learned from W s on. Before
    a concept was seen in training, or loaded, it changes nothing: the layer returns exactly what the wrapped projection does.

    The layer takes over the projection's own weight and bias and freezes them. It is an `nn.Linear` with the same state-dict keys, so that
    LoRA and checkpoints work on it as on the layer it replaces. Axes: b batch, n tokens, c concepts, p prompt slots, d input features,
    o output features.

    Args:
        key_or_values_proj: the projection to wrap.
        C: the input covariance, shape (d, d), or an `InputCovariance` that many layers share; needed for training only.
        is_key_proj: True for keys, whose output is locked; False for values.
        num_finetune_prompts: p, slots for per-prompt statistics.
        num_concepts: c.
        text_seq_len: where given, text encodings must have this many tokens.
        input_decay: δ of the moving averages i* ← δ i* + (1 − δ) mean, in [0, 1).
        train_beta, train_temperature: the gate in training calls; dimensionless, beta 1.0 is the concept itself; temperature above 0.
        eval_beta, eval_temperature: the gate elsewhere, for all concepts; the buffers of these names, shape (c,), set it for each.
        frac_gradient_concept_embed: in [0, 1], scales the gradient that flows from training calls into the text encoder.

    Raises:
        ValueError: the projection is no plain `nn.Linear`, or an option is out of its range; covariance errors as `InputCovariance` says.

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
        input_decay: float | int = 0.99,
        train_beta: float | int = 0.75,
        train_temperature: float | int = 0.1,
        eval_beta: float | int = 0.70,
        eval_temperature: float | int = 0.15,
        frac_gradient_concept_embed: float | int = 0.1,
    ):
        proj = key_or_values_proj
        if type(proj) is not nn.Linear:
            raise ValueError(
                f"`key_or_values_proj` must be a plain nn.Linear, got {type(proj).__name__}. Wrapped layers cannot be wrapped again; wrap "
                "a LoRA layer's `base_layer`; quantised layers are not supported."
            )
        for name, value, fits, needed in (
            ("num_finetune_prompts", num_finetune_prompts, num_finetune_prompts >= 1, "at least 1"),
            ("num_concepts", num_concepts, num_concepts >= 1, "at least 1"),
            ("input_decay", input_decay, 0 <= input_decay < 1, "in [0, 1)"),
            ("train_temperature", train_temperature, train_temperature > 0, "above 0"),
            ("eval_temperature", eval_temperature, eval_temperature > 0, "above 0"),
            ("frac_gradient_concept_embed", frac_gradient_concept_embed, 0 <= frac_gradient_concept_embed <= 1, "in [0, 1]"),
        ):
            if not fits:
                raise ValueError(f"`{name}` must be {needed}, got {value}.")
        d, o = proj.in_features, proj.out_features
        if C is not None and not isinstance(C, InputCovariance):
            C = InputCovariance(C)
        if C is not None:
            if C.dim != d:
                raise ValueError(f"`C` must have shape ({d}, {d}) to match the wrapped projection, got ({C.dim}, {C.dim}).")
            C.inverse()  # a covariance that cannot be inverted is an error now and not in the first training step

        nn.Module.__init__(self)  # nn.Linear's own would draw random numbers
        self.in_features, self.out_features = d, o
        self.weight, self.bias = proj.weight, proj.bias
        self.train(proj.training)
        # In a tuple, the original is no submodule: it is reachable for unwrapping and registered once.
        self._original = (proj, tuple(p.requires_grad for p in proj.parameters()))
        for parameter in proj.parameters():
            parameter.requires_grad_(False)

        self.covariance = C
        self.is_key_proj = is_key_proj
        self.num_finetune_prompts = num_finetune_prompts
        self.num_concepts = num_concepts
        self.text_seq_len = text_seq_len
        self.input_decay = input_decay
        self.train_beta = train_beta
        self.train_temperature = train_temperature
        self.frac_gradient_concept_embed = frac_gradient_concept_embed

        def zeros(*shape, dtype=torch.float32):
            return torch.zeros(num_concepts, *shape, dtype=dtype, device=proj.weight.device)

        self.register_buffer("concept_input", zeros(num_finetune_prompts, d))
        self.register_buffer("superclass_input", zeros(num_finetune_prompts, d))
        self.register_buffer("initialized", zeros(num_finetune_prompts, dtype=torch.bool))
        self.register_buffer("concept_dual", zeros(d))
        self.register_buffer("eval_beta", zeros() + eval_beta)
        self.register_buffer("eval_temperature", zeros() + eval_temperature)
        if not is_key_proj:
            self.concept_output = nn.Parameter(zeros(o))

        self._concept_inputs = None  # set by the context manager `concept_inputs`
        self._recent_calls = RecentCalls(maxlen=4)

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

        With `concept_indices` in training mode this is a training call: it moves the averages i* and s (once; a recomputation by activation
        checkpointing moves nothing), starts `concept_output` at W s in its first call, and applies the training gate to rows with the
        concept. Every other call is an inference call and changes nothing.

        Args:
            text_enc: e, shape (b, n, d).
            text_enc_with_superclass, concept_indices, superclass_indices, prompt_ids: see `ConceptInputs`.
            concept_id: inference: the concepts to apply, by default all that were trained. Training: the one that is trained, by default 0.

        Returns:
            Keys or values, shape (b, n, o), of the dtype that the plain projection would return.

        Raises:
            ValueError: a shape, position or id does not fit.
            RuntimeError: training without a covariance, or the first call of a slot without superclass encodings.
        """
        if text_enc.shape[-1] != self.in_features or self.text_seq_len not in (None, text_enc.shape[-2]):
            tokens = "n" if self.text_seq_len is None else self.text_seq_len
            raise ValueError(
                f"`text_enc` must have shape (b, {tokens}, {self.in_features}) to match the wrapped projection, "
                f"got {tuple(text_enc.shape)}."
            )
        is_training_call = self.training and (concept_indices is not None or self._concept_inputs is not None)
        if not self.training or (torch.compiler.is_compiling() and not is_training_call):
            return self._inference_call(text_enc, concept_id)
        recomputing = torch._C._current_graph_task_id() != -1  # a forward inside a backward pass
        if recomputing:
            for call in reversed(self._recent_calls):  # the latest: the same encodings may come back after the averages moved
                if call.text_enc.shape == text_enc.shape and torch.equal(call.text_enc, text_enc):
                    return self._training_output(text_enc, call)
        inputs = self._concept_inputs
        if concept_indices is not None:
            inputs = ConceptInputs(text_enc_with_superclass, concept_indices, superclass_indices, prompt_ids, concept_id or 0)
            inputs.validate(self, text_enc.shape[-2])
        if inputs is None:
            return self._inference_call(text_enc, concept_id)
        if recomputing:
            raise RuntimeError(
                "A training call is recomputed in backward, but its inputs are no longer known: they must be the same text encodings "
                "as in one of this layer's last four training calls. Call backward before further forward passes, and do "
                "not leave by an exception."
            )
        with torch.autocast(text_enc.device.type, enabled=False):  # averages in bfloat16 would lose what one call adds
            call = self._advance(text_enc, inputs)
        return self._training_output(text_enc, call)

    def _inference_call(self, text_enc, concept_id):
        plain = super().forward(text_enc)
        self._check_concept_id(concept_id)
        chosen = slice(None) if concept_id is None else [concept_id] if isinstance(concept_id, int) else list(concept_id)
        seen = self.initialized[chosen].unsqueeze(-1)
        count = seen.sum(dim=1).clamp_min(1)
        concept_input = (self.concept_input[chosen] * seen).sum(dim=1) / count
        if self.is_key_proj:
            superclass_input = (self.superclass_input[chosen] * seen).sum(dim=1) / count
            output = self._project(superclass_input)
        else:
            output = self.concept_output[chosen]
        gate = self.eval_beta[chosen], self.eval_temperature[chosen]
        return self._add_delta(plain, text_enc, concept_input, self.concept_dual[chosen], output, *gate, seen.any(dim=1).squeeze(-1))

    def _training_output(self, text_enc, call):
        """Compute a training call's output; a pure function of the encodings and the call's constants, so it may be recomputed."""
        fraction = self.frac_gradient_concept_embed
        text_enc = text_enc.detach() + (text_enc - text_enc.detach()) * fraction  # scales the gradient; the value stays exact
        plain = super().forward(text_enc)
        if not len(call.averaging):
            return plain
        rows = torch.arange(len(text_enc), device=text_enc.device)
        with torch.autocast(text_enc.device.type, enabled=False):
            mean = call.averaging @ text_enc[rows, call.positions].to(call.averaging.dtype)
            concept_input = call.concept_input + (mean - mean.detach())  # straight through to this call's mean
            dual = concept_dual(concept_input, self.covariance.inverse(text_enc.device, concept_input.dtype))
        if self.is_key_proj:
            output = self._project(call.superclass_input)[call.slots].unsqueeze(1)
        else:
            output = self.concept_output[call.concept_id : call.concept_id + 1]
        concept_input, dual = concept_input[call.slots].unsqueeze(1), dual[call.slots].unsqueeze(1)
        return self._add_delta(
            plain, text_enc, concept_input, dual, output, self.train_beta, self.train_temperature, call.active.unsqueeze(1)
        )

    @torch.no_grad()
    def _advance(self, text_enc, inputs):
        """Move the averages by one training call, and return the call's constants."""
        if self.covariance is None:
            raise RuntimeError(
                "Training needs the input covariance, but this layer was made with C=None. Pass `C` when you wrap the projection."
            )
        batch, device, concept_id = len(text_enc), text_enc.device, inputs.concept_id
        if text_enc.ndim != 3 or batch != len(inputs.concept_indices):
            raise ValueError(
                f"`text_enc` must have shape (b, n, d) with one row for each of the {len(inputs.concept_indices)} `concept_indices`, "
                f"got {tuple(text_enc.shape)}."
            )
        superclass = inputs.text_enc_with_superclass
        if superclass is not None and superclass.shape != text_enc.shape:
            raise ValueError(
                f"`text_enc_with_superclass` must have shape {tuple(text_enc.shape)}, as `text_enc` has, got {tuple(superclass.shape)}. "
                "Pad the prompts of both to one length."
            )
        positions = inputs.concept_indices.to(device, torch.int64)
        active = positions >= 0
        prompt_ids = torch.zeros_like(positions) if inputs.prompt_ids is None else inputs.prompt_ids.to(device, torch.int64)
        present, slots = prompt_ids[active].unique(return_inverse=True)
        row_slots = torch.zeros_like(positions).masked_scatter(active, slots)
        dtype = torch.promote_types(text_enc.dtype, torch.float32)
        averaging = F.one_hot(row_slots, max(len(present), 1)).T[: len(present)].to(dtype) * active
        averaging = averaging / averaging.sum(dim=1, keepdim=True)
        rows = torch.arange(batch, device=device)

        def slot_means(encodings, where):
            return averaging @ encodings[rows, where.clamp_min(0)].to(dtype)

        seen = self.initialized[concept_id, present]
        if superclass is None and not seen.all():
            raise ValueError(
                "`text_enc_with_superclass` must be given in the first training call of a slot, got None. Encode the same prompts with the "
                "superclass word in the concept's place."
            )
        new_input = self._averaged("concept_input", concept_id, present, slot_means(text_enc, positions))
        if superclass is None:
            new_superclass = self.superclass_input[concept_id, present].to(dtype)
        else:
            superclass = superclass.to(device)
            where = positions if inputs.superclass_indices is None else inputs.superclass_indices.to(device, torch.int64)
            new_superclass = self._averaged("superclass_input", concept_id, present, slot_means(superclass, where))
            if len(present) and not self.is_key_proj and not self.initialized[concept_id].any():
                # Through `.data`: the graphs of other concepts, which hold this parameter's other rows, stay valid.
                self.concept_output.data[concept_id] = self._project(superclass[rows, where.clamp_min(0)][active].to(dtype).mean(dim=0))
        if len(present):
            # New tensors instead of writes in place: a graph that still holds the old ones stays valid.
            initialized, dual = self.initialized.clone(), self.concept_dual.clone()
            initialized[concept_id, present] = True
            mean = self.concept_input[concept_id][initialized[concept_id]].mean(dim=0)
            dual[concept_id] = concept_dual(mean, self.covariance.inverse(device, mean.dtype))
            self.initialized, self.concept_dual = initialized, dual
        call = TrainingCall(text_enc.detach(), averaging, positions.clamp_min(0), row_slots, active, new_input, new_superclass, concept_id)
        self._recent_calls.append(call)
        return call

    def _averaged(self, name, concept_id, present, mean):
        """Move one moving average at the slots of a call, and return its new values there."""
        buffer = getattr(self, name).clone()
        seen = self.initialized[concept_id, present].unsqueeze(-1)
        decay = self.input_decay
        new = torch.where(seen, decay * buffer[concept_id, present] + (1 - decay) * mean, mean)
        buffer[concept_id, present] = new.to(buffer.dtype)
        setattr(self, name, buffer)
        return new

    def _project(self, inputs):
        """Return W x without the bias, in the inputs' dtype."""
        with torch.autocast(inputs.device.type, enabled=False):
            return F.linear(inputs.to(self.weight.dtype), self.weight).to(inputs.dtype)

    def _add_delta(self, plain, text_enc, concept_input, dual, output, beta, temperature, active):
        with torch.autocast(text_enc.device.type, enabled=False):
            dtype = torch.promote_types(text_enc.dtype, torch.float32)
            concept_input, dual, output = (t.to(dtype) for t in (concept_input, dual, output))
            delta = rank1_edit_delta(text_enc.to(dtype), self.weight, concept_input, dual, output, beta, temperature, active)
            return plain + delta.to(plain.dtype)

    def _check_concept_id(self, concept_id):
        ids = () if concept_id is None else (concept_id,) if isinstance(concept_id, int) else concept_id
        if len(set(ids)) != len(ids) or not all(0 <= i < self.num_concepts for i in ids):
            raise ValueError(f"`concept_id` must be different concepts from 0 to {self.num_concepts - 1}, got {concept_id}.")

    def _apply(self, fn, recurse=True):
        """Convert as every module does, but keep what is averaged or learned in float32."""
        with kept_in_float32(self, KEPT_IN_FLOAT32):
            return super()._apply(fn, recurse)

    def extra_repr(self):
        options = (f"{name}={getattr(self, name)}" for name in ("is_key_proj", "num_finetune_prompts", "num_concepts"))
        return ", ".join([super().extra_repr(), *options])
