import torch


def check_contiguous(**tensors):
    for name, tensor in tensors.items():
        if not tensor.is_contiguous():
            raise RuntimeError(f"{name} must be contiguous")


class MOELinear(torch.autograd.Function):
    @staticmethod
    def forward(ctx, rows, counts, weight, bias=None):
        check_contiguous(rows=rows, weight=weight, **({} if bias is None else {"bias": bias}))
        assert rows.dtype == weight.dtype and (bias is None or bias.dtype == weight.dtype)
        assert counts.dtype == torch.int64 and counts.device.type == "cpu" and int(counts.sum()) == rows.shape[0]
        ctx.save_for_backward(rows, weight)
        ctx.counts, ctx.has_bias = counts.tolist(), bias is not None
        parts = [part @ w.t() for part, w in zip(rows.split(ctx.counts), weight, strict=True)]
        return torch.cat(parts) if bias is None else torch.cat(parts) + bias.repeat_interleave(counts, 0)

    @staticmethod
    def backward(ctx, grad):
        check_contiguous(grad=grad)
        rows, weight = ctx.saved_tensors
        grads, parts = grad.split(ctx.counts), rows.split(ctx.counts)
        of_rows = torch.cat([g @ w for g, w in zip(grads, weight, strict=True)])
        of_weight = torch.stack([g.t() @ part for g, part in zip(grads, parts, strict=True)])
        return of_rows, None, of_weight, torch.stack([g.sum(0) for g in grads]) if ctx.has_bias else None
