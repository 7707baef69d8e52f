"""The equations of Perfusion (arXiv 2305.01644) and ROME (arXiv 2202.05262), slow and in float64.

The fast code is measured by them.

Loops over batch, tokens and concepts, one vector at a time. The metric is ⟨a, b⟩ = aᵀ C⁻¹ b, always through a
linear solve. Nothing here comes from the package.
"""

import math

import torch


def float64(*tensors):
    return [t.detach().double() for t in tensors]


def inner(a, b, covariance):
    """⟨a, b⟩ = aᵀ C⁻¹ b."""
    return torch.dot(a, torch.linalg.solve(covariance, b))


def similarity(encoding, concept_input, covariance):
    """r(e) = ⟨i*, e⟩ / ⟨i*, i*⟩ of one token and one concept."""
    return inner(concept_input, encoding, covariance) / inner(concept_input, concept_input, covariance)


def sigmoid(x):
    return 1 / (1 + math.exp(-x)) if x > -700 else 0.0


def edit_of_one(text_enc, weight, covariance, concept_input, concept_output, beta, temperature):
    """Eq. 3: h(e) = W (e − i* r(e)) + o* σ((r(e) − β) / τ), for text encodings (b, n, d)."""
    text_enc, weight, covariance, concept_input, concept_output = float64(
        text_enc, weight, covariance, concept_input, concept_output
    )
    result = torch.empty(*text_enc.shape[:2], len(weight), dtype=torch.float64)
    for b in range(text_enc.shape[0]):
        for n in range(text_enc.shape[1]):
            e = text_enc[b, n]
            r = similarity(e, concept_input, covariance)
            result[b, n] = (
                weight @ (e - r * concept_input) + sigmoid(float((r - beta) / temperature)) * concept_output
            )
    return result


def part_in_span(encoding, concept_inputs, covariance):
    """The ⟨·,·⟩-orthogonal projection of one encoding onto the span of concept inputs (c, d).

    As in appendix B: Cholesky, then QR.

    With C = A Aᵀ the metric is ⟨a, b⟩ = (A⁻¹ a) · (A⁻¹ b): in the coordinates A⁻¹ e an ordinary orthogonal
    basis will do.
    """
    a = torch.linalg.cholesky(covariance)
    basis, _ = torch.linalg.qr(torch.linalg.solve_triangular(a, concept_inputs.T, upper=False))
    whitened = torch.linalg.solve_triangular(a, encoding.unsqueeze(1), upper=False)
    return (a @ (basis @ (basis.T @ whitened))).squeeze(1)


def edit_of_many(text_enc, weight, covariance, concept_inputs, concept_outputs, betas, temperatures):
    """Appendix B: encodings lose their part in the joint span, and each concept adds its gated output."""
    text_enc, weight, covariance = float64(text_enc, weight, covariance)
    concept_inputs, concept_outputs = float64(concept_inputs, concept_outputs)
    result = torch.empty(*text_enc.shape[:2], len(weight), dtype=torch.float64)
    for b in range(text_enc.shape[0]):
        for n in range(text_enc.shape[1]):
            e = text_enc[b, n]
            result[b, n] = weight @ (e - part_in_span(e, concept_inputs, covariance))
            for i, o, beta, temperature in zip(
                concept_inputs, concept_outputs, betas, temperatures, strict=True
            ):
                gate = sigmoid((similarity(e, i, covariance).item() - float(beta)) / float(temperature))
                result[b, n] += gate * o
    return result


def gated_edit_of_many(
    text_enc, weight, covariance, concept_inputs, concept_outputs, betas, temperatures, gates_removal
):
    """h(e) = W e + Σⱼ (gⱼ oⱼ* − wⱼ W iⱼ r̃ⱼ), with wⱼ = gⱼ in the gated form and 1 in eq. 3.

    r̃ are the coordinates of the ⟨·,·⟩-orthogonal projection in the concept inputs.
    """
    text_enc, weight, covariance = float64(text_enc, weight, covariance)
    concept_inputs, concept_outputs = float64(concept_inputs, concept_outputs)
    result = torch.empty(*text_enc.shape[:2], len(weight), dtype=torch.float64)
    for b in range(text_enc.shape[0]):
        for n in range(text_enc.shape[1]):
            e = text_enc[b, n]
            part = part_in_span(e, concept_inputs, covariance)
            coordinates = torch.linalg.lstsq(concept_inputs.T, part.unsqueeze(1)).solution.squeeze(1)
            result[b, n] = weight @ e
            for j, (i, o) in enumerate(zip(concept_inputs, concept_outputs, strict=True)):
                r = similarity(e, i, covariance).item()
                gate = sigmoid((r - float(betas[j])) / float(temperatures[j]))
                removed = gate if gates_removal[j] else 1.0
                result[b, n] += gate * o - removed * coordinates[j] * (weight @ i)
    return result


def oblique_edit_of_many(
    text_enc, weight, covariances, concept_inputs, concept_outputs, betas, temperatures, gates_removal
):
    """The same for concepts that were trained with a covariance each, ⟨a, b⟩ⱼ = aᵀ Cⱼ⁻¹ b.

    r̃ solves Σₗ rⱼ(iₗ) r̃ₗ(e) = rⱼ(e) for every j, so that e − Σ iₗ r̃ₗ(e) has no part in any concept. With one
    covariance for all this is the orthogonal projection, and otherwise an oblique one.
    """
    text_enc, weight, *covariances = float64(text_enc, weight, *covariances)
    concept_inputs, concept_outputs = float64(concept_inputs, concept_outputs)
    concepts = range(len(concept_inputs))

    def similarities(e):
        return torch.stack([similarity(e, concept_inputs[j], covariances[j]) for j in concepts])

    overlap = torch.stack([similarities(i) for i in concept_inputs], dim=1)
    result = torch.empty(*text_enc.shape[:2], len(weight), dtype=torch.float64)
    for b in range(text_enc.shape[0]):
        for n in range(text_enc.shape[1]):
            r = similarities(text_enc[b, n])
            coordinates = torch.linalg.solve(overlap, r)
            result[b, n] = weight @ text_enc[b, n]
            for j in concepts:
                gate = sigmoid((r[j].item() - float(betas[j])) / float(temperatures[j]))
                removed = gate if gates_removal[j] else 1.0
                result[b, n] += gate * concept_outputs[j] - removed * coordinates[j] * (
                    weight @ concept_inputs[j]
                )
    return result


def rome_update(weight, covariance, concept_inputs, concept_outputs):
    """ROME's eq. 1: the Ŵ that minimises E‖Ŵe − We‖² subject to Ŵ iⱼ = oⱼ, one output row at a time from the
    Lagrange conditions.

    With Δ a row of Ŵ − W:  C Δ − I λ = 0  and  Iᵀ Δ = o − Iᵀ w.
    """
    weight, covariance, concept_inputs, concept_outputs = float64(
        weight, covariance, concept_inputs, concept_outputs
    )
    c, d = concept_inputs.shape
    conditions = torch.zeros(d + c, d + c, dtype=torch.float64)
    conditions[:d, :d], conditions[:d, d:], conditions[d:, :d] = covariance, -concept_inputs.T, concept_inputs
    updated = torch.empty_like(weight)
    for row in range(len(weight)):
        w = weight[row]
        wanted = torch.stack([concept_outputs[j, row] - torch.dot(concept_inputs[j], w) for j in range(c)])
        updated[row] = (
            w + torch.linalg.solve(conditions, torch.cat([torch.zeros(d, dtype=torch.float64), wanted]))[:d]
        )
    return updated


def moving_averages(calls, decay):
    """Return {slot: average} after calls of (encodings (b, n, d), positions, slots).

    A position of −1 is a row without the concept.
    """
    averages = {}
    for encodings, positions, slots in calls:
        found = {}
        for row, (position, slot) in enumerate(zip(positions, slots, strict=True)):
            if position >= 0:
                found.setdefault(slot, []).append(encodings[row, position].detach().double())
        for slot, vectors in found.items():
            mean = sum(vectors) / len(vectors)
            averages[slot] = decay * averages[slot] + (1 - decay) * mean if slot in averages else mean
    return averages


def masked_loss(prediction, target, mask):
    """The mean squared error over pixels and channels, weighted by the mask over its image's maximum."""
    total = 0.0
    for image in range(prediction.shape[0]):
        largest = max(mask[image].flatten().tolist())
        for channel in range(prediction.shape[1]):
            for y in range(prediction.shape[2]):
                for x in range(prediction.shape[3]):
                    weight = mask[image, y, x].item() / largest if largest else 0.0
                    total += (
                        weight
                        * (prediction[image, channel, y, x].item() - target[image, channel, y, x].item()) ** 2
                    )
    return torch.tensor(total / prediction.numel(), dtype=torch.float64)


def covariance_of(encodings, mask):
    """E[e eᵀ], the mean of outer products over the tokens that the mask counts."""
    total, count = torch.zeros(encodings.shape[-1], encodings.shape[-1], dtype=torch.float64), 0
    for row, counts in zip(encodings, mask, strict=True):
        for token, is_counted in zip(row.double(), counts.tolist(), strict=True):
            if is_counted:
                total += torch.outer(token, token)
                count += 1
    return total / count
