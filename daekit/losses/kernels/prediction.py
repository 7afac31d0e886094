"""CE, divergence and their gradient for one chunk of logits, fused: one program per token walks over the vocabulary.

The logits are read three times (twice for forward KL) and overwritten by the gradient: no other array of size M x V exists.
Sums are kept per lane of a block and in float32. A logit below -1e30, -inf too, counts as -1e30: its probability is 0, and 0
times its logarithm is 0 instead of NaN.
"""

# mypy: disable-error-code="no-untyped-def"
# (Triton gives the arguments of a kernel their types when it compiles it)
from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from daekit.errors import UserError
from daekit.losses.divergences import divergence_name, value_factor
from daekit.protocol import OutputHead
from daekit.recipe.objective import Objective

_BLOCK = 4096  # columns per step: 8 per thread, 16 bytes of a 16-bit row


def chunk_losses(
    student_MV: Tensor,
    teacher_MV: Tensor | None,
    labels_M: Tensor,
    objective: Objective,
    head: OutputHead,
    wants_gradient: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """Cross-entropy, divergence and correctness of M tokens; see ``daekit.losses.chunk.chunk_losses``, the torch version.

    Args:
        student_MV: bf16, fp16 or fp32, rows in one piece each (their stride may be longer).
        teacher_MV: only ``softmax(teacher_MV / T)`` counts.
        labels_M: the tokens, each in ``0 .. V - 1`` (any other makes its cross-entropy NaN).
        objective: divergence, temperature and weights.
        head: scale and soft-capping of the student's logits.
        wants_gradient: whether ``student_MV`` becomes the gradient.

    Returns:
        ``(ce_M, divergence_M, correct_M)``: float32 nats, ``T^2 * D`` (``D`` for ``tv``) in float32 nats, and whether the
        label is the first of the largest logits.
    """
    temperature = objective.temperature
    tokens, columns = student_MV.shape
    teacher = student_MV if teacher_MV is None else teacher_MV
    if columns > 1 and (student_MV.stride(1) != 1 or teacher.stride(1) != 1):
        raise UserError(f"logits with strides {student_MV.stride()} and {teacher.stride()}: each row must lie in one piece")
    ce_M = torch.empty(tokens, dtype=torch.float32, device=student_MV.device)
    divergence_M = torch.zeros_like(ce_M)
    correct_M = torch.empty_like(ce_M, dtype=torch.bool)
    factor = value_factor(objective)
    if tokens:
        with torch.cuda.device_of(student_MV):
            _chunk_kernel[(tokens,)](
                student_MV, teacher, labels_M, ce_M, divergence_M, correct_M.view(torch.uint8),
                student_MV.stride(0), teacher.stride(0), columns,
                float(head.scale), float(head.softcap or 1.0), float(objective.parameter), 1.0 / temperature, factor,
                float(objective.ce_weight), objective.prediction_weight * factor / temperature,  # d logits/T -> d logits
                TEACHER=teacher_MV is not None, DIVERGENCE=divergence_name(objective), TEMPERED=temperature != 1.0,
                SOFTCAP=head.softcap is not None, GRADIENT=wants_gradient, CE=objective.ce_weight != 0.0,
                BLOCK=min(_BLOCK, max(16, triton.next_power_of_2(columns))), num_warps=16, enable_fp_fusion=True,
            )  # fmt: skip
    return ce_M, divergence_M, correct_M


@triton.jit
def _chunk_kernel(
    student_ptr, teacher_ptr, labels_ptr, ce_ptr, divergence_ptr, correct_ptr, student_stride, teacher_stride, columns,
    scale, softcap, parameter, inv_temperature, factor, ce_weight, term_weight,
    TEACHER: tl.constexpr, DIVERGENCE: tl.constexpr, TEMPERED: tl.constexpr, SOFTCAP: tl.constexpr, GRADIENT: tl.constexpr,
    CE: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    token = tl.program_id(0).to(tl.int64)
    student_ptr += token * student_stride
    teacher_ptr += token * teacher_stride
    label = tl.load(labels_ptr + token)
    known = (label >= 0) & (label < columns)
    at_label = _capped(tl.load(student_ptr + label, mask=known, other=float("nan")).to(tl.float32) * scale, softcap, SOFTCAP)

    top, log_sum, tempered_log_sum, above = _student_sums(
        student_ptr, columns, scale, softcap, inv_temperature, label, at_label, TEMPERED, SOFTCAP, BLOCK
    )
    tl.store(ce_ptr + token, log_sum + (top - at_label))
    tl.store(correct_ptr + token, (above == 0).to(tl.uint8))

    centre = -1.0
    if TEACHER:
        teacher_top, teacher_log_sum = _teacher_sums(teacher_ptr, columns, inv_temperature, BLOCK)
        if GRADIENT and DIVERGENCE != "forward_kl":  # there the gradient term is -t, whose sum is known
            centre = _gradient_sum(
                student_ptr, teacher_ptr, columns, scale, softcap, inv_temperature, top, tempered_log_sum, teacher_top,
                teacher_log_sum, parameter, DIVERGENCE, SOFTCAP, BLOCK,
            )  # fmt: skip

    value_B = tl.zeros([BLOCK], tl.float32)
    if TEACHER or GRADIENT:
        for start in range(0, columns, BLOCK):
            column_B = start + tl.arange(0, BLOCK)
            x_B = _logits(student_ptr, column_B, columns, scale, softcap, SOFTCAP)
            grad_B = tl.zeros([BLOCK], tl.float32)
            if TEACHER:
                log_s_B = (x_B - top) * inv_temperature - tempered_log_sum
                teacher_B = _logits(teacher_ptr, column_B, columns, 1.0, 1.0, False)
                log_t_B = (teacher_B - teacher_top) * inv_temperature - teacher_log_sum
                summand_B, term_B = _divergence(log_s_B, log_t_B, parameter, DIVERGENCE)
                value_B += summand_B
                grad_B += term_weight * (term_B - tl.exp(log_s_B) * centre)
            if GRADIENT:
                if CE:
                    grad_B += ce_weight * (tl.exp(x_B - top - log_sum) - (column_B == label).to(tl.float32))
                if SOFTCAP:
                    capped_B = x_B * (1.0 / softcap)
                    grad_B *= 1.0 - capped_B * capped_B
                grad_B = (grad_B * scale).to(student_ptr.dtype.element_ty)
                tl.store(student_ptr + column_B, grad_B, mask=column_B < columns)
    if TEACHER:
        tl.store(divergence_ptr + token, factor * tl.sum(value_B, 0))


@triton.jit
def _student_sums(
    row_ptr, columns, scale, softcap, inv_temperature, label, at_label,
    TEMPERED: tl.constexpr, SOFTCAP: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Largest logit, log of sum(exp(logit - largest)) at temperatures 1 and T, and how many logits stand before the label's."""
    top = -1e38
    sum_B = tl.zeros([BLOCK], tl.float32)
    tempered_B = tl.zeros([BLOCK], tl.float32)
    above_B = tl.zeros([BLOCK], tl.int32)
    for start in range(0, columns, BLOCK):
        column_B = start + tl.arange(0, BLOCK)
        x_B = _logits(row_ptr, column_B, columns, scale, softcap, SOFTCAP)
        new_top = tl.maximum(top, tl.max(x_B, 0))
        sum_B = sum_B * tl.exp(top - new_top) + tl.exp(x_B - new_top)
        if TEMPERED:
            tempered_B = tempered_B * tl.exp((top - new_top) * inv_temperature) + tl.exp((x_B - new_top) * inv_temperature)
        above_B += (((column_B < label) & (x_B >= at_label)) | ((column_B > label) & (x_B > at_label))).to(tl.int32)
        top = new_top
    log_sum = tl.log(tl.sum(sum_B, 0))
    tempered_log_sum = log_sum
    if TEMPERED:
        tempered_log_sum = tl.log(tl.sum(tempered_B, 0))
    return top, log_sum, tempered_log_sum, tl.sum(above_B, 0)


@triton.jit
def _teacher_sums(row_ptr, columns, inv_temperature, BLOCK: tl.constexpr):
    """Largest logit and log of sum(exp((logit - largest) / T))."""
    top = -1e38
    sum_B = tl.zeros([BLOCK], tl.float32)
    for start in range(0, columns, BLOCK):
        x_B = _logits(row_ptr, start + tl.arange(0, BLOCK), columns, 1.0, 1.0, False)
        new_top = tl.maximum(top, tl.max(x_B, 0))
        sum_B = sum_B * tl.exp((top - new_top) * inv_temperature) + tl.exp((x_B - new_top) * inv_temperature)
        top = new_top
    return top, tl.log(tl.sum(sum_B, 0))


@triton.jit
def _gradient_sum(
    student_ptr, teacher_ptr, columns, scale, softcap, inv_temperature, top, log_sum, teacher_top, teacher_log_sum, parameter,
    DIVERGENCE: tl.constexpr, SOFTCAP: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """``sum_v s_v g_v``, which the gradient needs before its first column can be written."""
    sum_B = tl.zeros([BLOCK], tl.float32)
    for start in range(0, columns, BLOCK):
        column_B = start + tl.arange(0, BLOCK)
        x_B = _logits(student_ptr, column_B, columns, scale, softcap, SOFTCAP)
        teacher_B = _logits(teacher_ptr, column_B, columns, 1.0, 1.0, False)
        log_s_B = (x_B - top) * inv_temperature - log_sum
        log_t_B = (teacher_B - teacher_top) * inv_temperature - teacher_log_sum
        _, term_B = _divergence(log_s_B, log_t_B, parameter, DIVERGENCE)
        sum_B += term_B
    return tl.sum(sum_B, 0)


@triton.jit
def _divergence(log_s_B, log_t_B, parameter, DIVERGENCE: tl.constexpr):
    """Summands of D, and the gradient term ``s * g`` with ``g = dD/ds`` up to a constant (which the gradient does not feel)."""
    s_B = tl.exp(log_s_B)
    t_B = tl.exp(log_t_B)
    if DIVERGENCE == "forward_kl":
        value_B = t_B * (log_t_B - log_s_B)
        term_B = -t_B
    elif DIVERGENCE == "reverse_kl":
        value_B = s_B * (log_s_B - log_t_B)
        term_B = value_B
    elif DIVERGENCE == "tv":
        value_B = 0.5 * tl.abs(t_B - s_B)
        term_B = 0.5 * s_B * ((s_B > t_B).to(tl.float32) - (s_B < t_B).to(tl.float32))
    else:
        weight_t = parameter
        if DIVERGENCE == "skew_reverse_kl":
            weight_t = 1.0 - parameter
        weight_s = 1.0 - weight_t
        # log(s/m) and log(t/m) by way of the larger of s and t: nothing overflows, no large logarithms are subtracted
        log_ratio_B = log_t_B - log_s_B
        small_B = tl.exp(-tl.abs(log_ratio_B))
        larger_m_B = -tl.log(tl.where(log_ratio_B > 0, weight_t + weight_s * small_B, weight_t * small_B + weight_s))
        s_m_B = larger_m_B - tl.maximum(log_ratio_B, 0.0)
        t_m_B = larger_m_B + tl.minimum(log_ratio_B, 0.0)
        if DIVERGENCE == "jsd":
            value_B = weight_t * t_B * t_m_B + weight_s * s_B * s_m_B
            term_B = weight_s * s_B * s_m_B
        elif DIVERGENCE == "skew_kl":
            value_B = t_B * t_m_B
            term_B = -weight_s * s_B * tl.exp(t_m_B)
        else:
            value_B = s_B * s_m_B
            term_B = s_B * (s_m_B - weight_s * tl.exp(s_m_B))
    return value_B, term_B


@triton.jit
def _logits(row_ptr, column_B, columns, scale, softcap, SOFTCAP: tl.constexpr):
    """A block of logits in float32, -1e30 beyond the last column."""
    inside_B = column_B < columns
    x_B = tl.load(row_ptr + column_B, mask=inside_B, other=0.0).to(tl.float32)
    x_B = _capped(x_B * scale, softcap, SOFTCAP)
    return tl.where(inside_B & ~(x_B < -1e30), x_B, -1e30)  # written so that NaN stays NaN


@triton.jit
def _capped(x, softcap, SOFTCAP: tl.constexpr):
    if SOFTCAP:
        x = softcap * (2.0 * tl.sigmoid(x * (2.0 / softcap)) - 1.0)  # tanh(x) = 2 sigmoid(2x) - 1
    return x
