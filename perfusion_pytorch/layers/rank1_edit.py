"""`Rank1EditModule`: a key or value projection with key-locked rank-1 edits applied in its forward (Perfusion, sections 3 and 4)."""

from functools import partial

import torch
import torch.nn.functional as F
from beartype import beartype
from torch import Tensor, nn

from perfusion_pytorch.layers.checks import check_weight, warn_if_parallel
from perfusion_pytorch.layers.covariance import InputCovariance
from perfusion_pytorch.layers.functional import add_product, concept_dual, split_concepts
from perfusion_pytorch.layers.options import LAYER_DEFAULTS, check_layer_options
from perfusion_pytorch.layers.precision import is_autocast, kept_in_float32, without_autocast
from perfusion_pytorch.layers.training_call import ConceptInputs, RecentCall, RecentCalls, TrainingCall

KEPT_IN_FLOAT32 = (
    "concept_input",
    "superclass_input",
    "concept_dual",
    "eval_beta",
    "eval_temperature",
    "concept_output",
)
NUM_RECENT_CALLS = 8  # calls in training mode that a layer can recompute in backward


class Rank1EditModule(nn.Linear):
    """A frozen key or value projection whose forward carries key-locked rank-1 edits.

        h(e) = W (e − Σⱼ iⱼ r̃ⱼ(e)) + Σⱼ oⱼ* σ((rⱼ(e) − βⱼ) / τⱼ)   (Perfusion, eq. 3 and appendix B; see `functional.py`)

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
        input_decay: float | int = LAYER_DEFAULTS.input_decay,
        train_beta: float | int = LAYER_DEFAULTS.train_beta,
        train_temperature: float | int = LAYER_DEFAULTS.train_temperature,
        eval_beta: float | int = LAYER_DEFAULTS.eval_beta,
        eval_temperature: float | int = LAYER_DEFAULTS.eval_temperature,
        frac_gradient_concept_embed: float | int = LAYER_DEFAULTS.frac_gradient_concept_embed,
    ):
        proj = key_or_values_proj
        if type(proj) is not nn.Linear:
            raise ValueError(
                f"`key_or_values_proj` must be a plain nn.Linear, got {type(proj).__name__}. Wrapped layers cannot be wrapped again; wrap "
                "a LoRA layer's `base_layer`; quantised layers are not supported."
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
        d, o = proj.in_features, proj.out_features
        if C is not None and not isinstance(C, InputCovariance):
            C = InputCovariance(C)
        if C is not None:
            if C.dim != d:
                raise ValueError(
                    f"`C` must have shape ({d}, {d}) to match the wrapped projection, got ({C.dim}, {C.dim})."
                )
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
        self._recent_calls = RecentCalls(maxlen=NUM_RECENT_CALLS)
        self.register_load_state_dict_post_hook(warn_if_parallel)

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
        if (
            text_enc.ndim not in (2, 3)
            or text_enc.shape[-1] != self.in_features
            or self.text_seq_len not in (None, text_enc.shape[-2])
        ):
            tokens = "n" if self.text_seq_len is None else self.text_seq_len
            raise ValueError(
                f"`text_enc` must have shape (b, {tokens}, {self.in_features}) to match the wrapped projection, "
                f"got {tuple(text_enc.shape)}."
            )
        if text_enc.dtype != self.weight.dtype and (
            text_enc.dtype == torch.float64 or not is_autocast(text_enc)
        ):
            raise ValueError(
                f"`text_enc` must be of {self.weight.dtype}, as the wrapped projection is, got {text_enc.dtype}."
            )
        inputs = self._concept_inputs
        if concept_indices is not None:
            trained_id = 0 if concept_id is None else concept_id
            inputs = ConceptInputs(
                text_enc_with_superclass, concept_indices, superclass_indices, prompt_ids, trained_id
            )
        elif text_enc_with_superclass is not None:
            raise ValueError(
                "`concept_indices` must be given along with `text_enc_with_superclass`, got None."
            )
        if not self.training or (inputs is None and torch.compiler.is_compiling()):
            return self._inference_call(text_enc, concept_id)
        if (
            torch._C._current_graph_task_id() != -1
        ):  # inside a backward pass, so this is activation checkpointing that recomputes
            recent = self._recent_calls.find(text_enc, None if concept_indices is None else inputs)
            if recent is None:
                raise RuntimeError(
                    f"A call is recomputed in backward, but its inputs are no longer known: they must be the same text encodings as in one "
                    f"of this layer's last {NUM_RECENT_CALLS} calls. Call backward before further forward passes, and do not leave "
                    "`concept_inputs` by an exception."
                )
            if recent.call is not None:
                return self._training_output(text_enc, recent.call, recent.call.split)
        elif inputs is None:
            self._recent_calls.append(RecentCall(text_enc.detach(), None, None))
        else:
            if concept_indices is not None:
                inputs.validate(self, text_enc.shape[-2])
            with without_autocast(text_enc):  # averages in bfloat16 would lose what one call adds
                call = self._advance(text_enc, inputs)
            self._recent_calls.append(RecentCall(call.means.text_enc, inputs.question(), call))
            return self._training_output(text_enc, call, partial(inputs.split, call))
        return self._inference_call(text_enc, concept_id)

    def _inference_call(self, text_enc, concept_id):
        self._check_concept_id(concept_id)
        chosen = (
            None if concept_id is None else [concept_id] if isinstance(concept_id, int) else list(concept_id)
        )

        def of_chosen(values):
            return values if chosen is None else values[chosen]

        seen = of_chosen(self.initialized)
        concept_input = self._mean_of_slots(of_chosen(self.concept_input), seen)
        output = (
            self._mean_of_slots(of_chosen(self.superclass_input), seen)
            if self.is_key_proj
            else of_chosen(self.concept_output)
        )
        dtype = torch.promote_types(text_enc.dtype, torch.float32)
        concept_input, output = concept_input.to(dtype), output.to(dtype)
        dual, beta, temperature = (
            of_chosen(v).to(dtype) for v in (self.concept_dual, self.eval_beta, self.eval_temperature)
        )
        try:
            with without_autocast(text_enc):
                rest, gate = split_concepts(
                    text_enc.to(dtype), concept_input, dual, beta, temperature, seen.any(dim=1)
                )
        except torch.linalg.LinAlgError as error:
            raise ValueError(
                f"Concepts that are applied together must differ, but some of concepts {concept_id or 'of this layer'} are parallel. Apply "
                "them one at a time with `concept_id`."
            ) from error
        return self._project_edited(text_enc.dtype, rest, gate, output)

    def _mean_of_slots(self, values, seen):
        """Return a statistic's mean (c, d) over the seen slots (c, p) of each concept; 0 where none was seen."""
        if self.num_finetune_prompts == 1:
            return values.squeeze(1)
        return (values * seen.unsqueeze(-1)).sum(dim=1) / seen.sum(dim=1, keepdim=True).clamp_min(1)

    def _training_output(self, text_enc, call, split):
        """Compute a training call's output; a pure function of the encodings and the call's constants, so it may be recomputed."""
        options = {
            "beta": self.train_beta,
            "temperature": self.train_temperature,
            "fraction": self.frac_gradient_concept_embed,
        }
        with without_autocast(text_enc):
            rest, gate = split(text_enc, self.covariance, **options)
            output = (
                call.of_rows(call.superclass_input)
                if self.is_key_proj
                else self.concept_output[call.concept_id].unsqueeze(0)
            )
        return self._project_edited(text_enc.dtype, rest, gate, output.to(rest.dtype))

    @torch.no_grad()
    def _advance(self, text_enc, inputs):
        """Move the averages by one training call, and return the call's constants."""
        if self.covariance is None:
            raise RuntimeError(
                "Training needs the input covariance, but this layer was made with C=None. Pass `C` when you wrap the projection."
            )
        means, concept_id = inputs.means(text_enc, self.num_finetune_prompts), inputs.concept_id
        if not means.count:
            return TrainingCall(
                means, concept_id, means.concept, means.concept, means.concept[:, :1], means.concept
            )
        seen = self.initialized[concept_id, means.slots]
        if means.superclass is None and not seen.all():
            raise ValueError(
                "`text_enc_with_superclass` must be given in the first training call of a slot, got None. Encode the same prompts with the "
                "superclass word in the concept's place."
            )
        is_first_call = not self.initialized[concept_id].any()
        decay = self.input_decay * seen.unsqueeze(-1).to(
            means.concept.dtype
        )  # the first sight of a slot takes the mean itself
        inverse = self.covariance.inverse(text_enc.device, means.concept.dtype)
        new_input = self._averaged("concept_input", concept_id, means.slots, decay, means.concept)
        image = new_input @ inverse
        norm = (new_input * image).sum(dim=1, keepdim=True)
        if means.superclass is None:
            new_superclass = self.superclass_input[concept_id, means.slots].to(new_input.dtype)
        else:
            new_superclass = self._averaged(
                "superclass_input", concept_id, means.slots, decay, means.superclass
            )
        if is_first_call and not self.is_key_proj:
            # Through `.data`: the graphs of other concepts, which hold this parameter's other rows, stay valid.
            self.concept_output.data[concept_id] = self._project(means.superclass_of_rows)
        # New tensors instead of writes in place: a graph that still holds the old ones stays valid.
        self.initialized, self.concept_dual = self.initialized.clone(), self.concept_dual.clone()
        self.initialized[concept_id, means.slots] = True
        if self.num_finetune_prompts == 1:
            self.concept_dual[concept_id] = image[0] / norm[0]
        else:
            seen_inputs = self.concept_input[concept_id][self.initialized[concept_id]]
            self.concept_dual[concept_id] = concept_dual(seen_inputs.mean(dim=0).to(inverse.dtype), inverse)
        if self.num_concepts > 1:
            warn_if_parallel(self)
        return TrainingCall(means, concept_id, new_input, image / norm, norm, new_superclass)

    def _averaged(self, name, concept_id, slots, decay, mean):
        """Move one moving average at the slots of a call, and return its new values there."""
        buffer = getattr(self, name).clone()
        new = torch.lerp(mean, buffer[concept_id, slots].to(mean.dtype), decay)
        buffer[concept_id, slots] = new.to(buffer.dtype)
        setattr(self, name, buffer)
        return new

    def _project(self, inputs):
        """Return W x without the bias, in the inputs' dtype."""
        with without_autocast(inputs):
            return F.linear(inputs.to(self.weight.dtype), self.weight).to(inputs.dtype)

    def _project_edited(self, dtype, rest, gate, output):
        """Return W rest + output gate, and the bias once, in the dtype that the plain projection has for encodings of this dtype.

        A key's output is W s, so that its `output` here is s and is added before W, which spares a product; a value's is o*.
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

    def _check_concept_id(self, concept_id):
        ids = () if concept_id is None else (concept_id,) if isinstance(concept_id, int) else concept_id
        if len(set(ids)) != len(ids) or not all(0 <= i < self.num_concepts for i in ids):
            raise ValueError(
                f"`concept_id` must be different concepts from 0 to {self.num_concepts - 1}, got {concept_id}."
            )

    def _apply(self, fn, recurse=True):
        """Convert as every module does, but keep what is averaged or learned in float32."""
        with kept_in_float32(self, KEPT_IN_FLOAT32):
            return super()._apply(fn, recurse)

    def extra_repr(self):
        options = (
            f"{name}={getattr(self, name)}"
            for name in ("is_key_proj", "num_finetune_prompts", "num_concepts")
        )
        return ", ".join([super().extra_repr(), *options])
