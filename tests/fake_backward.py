"""A backward on fake tensors of a GPU that is not there."""

import itertools

import torch
from torch import Tensor


def run_backward(loss: Tensor) -> dict[Tensor, Tensor]:
    """Run each node of `loss`'s graph once, as autograd would; the gradients of its leaves.

    (autograd itself runs what is on a GPU in a thread that wants that GPU.) AssertionError for a
    gradient on another device than what it is of.
    """
    gradients, of_leaves = {(loss.grad_fn, 0): torch.ones_like(loss)}, {}
    for node in _from_the_loss_down(loss):
        of_outputs = [
            _as_autograd_hands_on(gradients.pop((node, i), None), metadata)
            for i, metadata in enumerate(node._input_metadata)
        ]
        if hasattr(node, "variable"):
            of_leaves[node.variable] = of_outputs[0]
            continue
        children = [child for child in node.next_functions if child[0] is not None]
        with torch.no_grad():
            found = _gradients_of_inputs(node, of_outputs)
        for child, gradient in zip(children, found, strict=True):
            if gradient is not None:
                before = gradients.get(child)
                gradients[child] = gradient if before is None else before + gradient
    return of_leaves


def _from_the_loss_down(loss):
    """All nodes, each before those it hands gradients to."""
    done, seen, stack = [], set(), [(loss.grad_fn, False)]
    while stack:
        node, are_children_done = stack.pop()
        if are_children_done:
            done.append(node)
        elif node not in seen:
            seen.add(node)
            stack.append((node, True))
            stack += [(child, False) for child, _ in node.next_functions if child is not None]
    return reversed(done)


def _as_autograd_hands_on(gradient, metadata):
    if gradient is None:
        return None
    assert gradient.device == metadata.device, (gradient.device, metadata.device)
    return gradient.sum_to_size(metadata.shape).to(metadata.dtype)


def _gradients_of_inputs(node, of_outputs):
    """Of those inputs that need one, in order."""
    is_pythons = isinstance(node, torch.autograd.function.BackwardCFunction)
    found = node.apply(*of_outputs) if is_pythons else node(*of_outputs)
    found = found if isinstance(found, tuple) else (found,)
    needed = (
        node.needs_input_grad
        if is_pythons
        else [child is not None for child, _ in node.next_functions]
    )
    return [*itertools.compress(found, needed)]
