"""The product's code, broken on purpose in known ways: proof that the layout tests can fail.

Each entry reintroduces a defect that real frameworks have shipped. `mutation(name)` applies it inside the process that
runs a layout; `mutation(None)` changes nothing.
"""

import dataclasses
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from unittest import mock

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.fsdp import FSDPModule

from megatron_lite.context_parallel import attention as cp_attention
from megatron_lite.context_parallel import block_attention, blocks
from megatron_lite.distributed import tied_embeddings
from megatron_lite.optimizer import clip_grads, optimizer
from megatron_lite.parallel_state import get_group, get_pipeline_model_parallel_rank
from megatron_lite.pipeline_parallel import pipelined, schedules
from megatron_lite.process_groups import group_rank, group_size
from megatron_lite.tensor_parallel import collectives, layers, linear, mappings, parameters
from megatron_lite.training import batches, step
from megatron_lite.transformer import multi_latent_attention, qkv_projection
from megatron_lite.transformer.moe import (
    auxiliary_losses,
    experts,
    load_balancing,
    routing,
    shared_experts,
    statistics,
    token_dispatcher,
)
from megatron_lite.transformer.moe.router import TopKRouter

FINALIZE = "megatron_lite.distributed.finalize_model_grads"  # the package has a function of that name


@contextmanager
def mutation(name: str | None) -> Iterator[None]:
    """Break the code as `name` says, until the end of the block."""
    with nullcontext() if name is None else MUTATIONS[name]():
        yield


def _undeclared(matches: Callable[[str], bool]):
    """Parameters whose name matches are no longer declared partial over tensor parallel ranks."""
    original = parameters.named_parameter_specs

    def broken(model):
        specs = original(model)
        return {
            name: dataclasses.replace(spec, partial_over_tp=False) if matches(name) else spec
            for name, spec in specs.items()
        }

    return mock.patch("megatron_lite.distributed.finalize_model_grads.named_parameter_specs", broken)


def norms_not_summed():
    """T1: norms under sequence parallelism are taken to have complete gradients."""
    return _undeclared(lambda name: "layernorm" in name and "q_layernorm" not in name and "k_layernorm" not in name)


def row_bias_not_summed():
    """T1: the same for the biases of row-parallel layers."""
    return _undeclared(lambda name: name.endswith(("linear_proj.bias", "linear_fc2.bias")))


def qk_norms_not_summed():
    """T2: query and key norms are taken to have complete gradients; wrong without sequence parallelism too."""
    return _undeclared(lambda name: "q_layernorm" in name or "k_layernorm" in name)


def shared_group_not_summed():
    """T10: keys and values that several ranks compute are taken to have complete gradients."""
    return _undeclared(lambda name: "linear_qkv" in name)


def partial_gradients_averaged():
    """T1: the sum over tensor parallel ranks became a mean."""
    original = dist.all_reduce

    def broken(tensor, op=dist.ReduceOp.SUM, group=None, **kwargs):
        original(tensor, op=op, group=group, **kwargs)
        if tensor.is_floating_point():  # not the counts that the comparison itself adds up
            tensor /= dist.get_world_size(group)

    return mock.patch("megatron_lite.distributed.finalize_model_grads.dist.all_reduce", broken)


def row_bias_on_every_rank():
    """T5: the row-parallel bias is added before the reduction, once on each rank."""

    def broken(self, input_):
        if not self.communicates:
            return torch.nn.functional.linear(input_, self.weight.to_local(), self.bias)
        reduce = (
            layers.reduce_scatter_to_sequence_parallel_region
            if self.sequence_parallel
            else layers.reduce_from_tensor_model_parallel_region
        )
        output = reduce(torch.nn.functional.linear(input_, self.weight.to_local(), self.bias), self.tp_group)
        return (output, None) if self.skip_bias_add else output

    return mock.patch.object(layers.RowParallelLinear, "forward", broken)


def local_softmax_denominator():
    """T7: cross entropy normalizes over this rank's part of the vocabulary alone."""

    def broken(tensor: Tensor, dim: int, group) -> Tensor:
        return torch.cat([tensor] * group.size(), dim=dim)

    return mock.patch.object(collectives, "all_gather", broken)


def padded_vocabulary_in_softmax():
    """T8: columns that pad the vocabulary take part in the softmax."""
    from megatron_lite.models.gpt import gpt_model

    original = gpt_model.linear_cross_entropy

    def broken(*arguments, vocab_size, **kwargs):
        return original(*arguments, vocab_size=128, **kwargs)

    return mock.patch.object(gpt_model, "linear_cross_entropy", broken)


def mean_of_local_means():
    """T22: each micro-batch is divided by its own token count, then averaged."""
    original = step.loss_weights
    return mock.patch.object(
        step,
        "loss_weights",
        lambda batches, total, size, per_token, group: original(batches, total, size, False, group),
    )


def tokens_counted_locally():
    """T17, T22: the token count is not summed over the data parallel ranks."""

    def broken(micro_batches, group):
        return step.valid_tokens(micro_batches).sum(0).clamp(min=1.0)

    return mock.patch.object(step, "count_tokens", broken)


def last_micro_batch_not_reduced():
    """T24, T25: gradients are reduced after each micro-batch but the last, whose gradients stay on their rank."""
    original = schedules.set_is_last_microbatch
    return mock.patch.object(schedules, "set_is_last_microbatch", lambda model, is_last: original(model, not is_last))


def gradients_averaged_over_data_parallel():
    """T22, T24: FSDP's usual mean instead of a sum."""
    original = FSDPModule.set_gradient_divide_factor

    def broken(self, factor):
        original(self, 2.0)

    return mock.patch.object(FSDPModule, "set_gradient_divide_factor", broken)


def replicas_counted_in_norm():
    """T26: each rank counts the parameters that all tensor parallel ranks hold."""
    return mock.patch.object(optimizer, "counts_here", return_value=True)


def local_norm():
    """T26: the norm is taken over this rank's shards alone."""
    original = clip_grads.global_grad_statistics

    def broken(gradients, device, count_zeros=False):
        with mock.patch.object(clip_grads.dist, "all_reduce", return_value=None):
            return original(gradients, device, count_zeros)

    return mock.patch.object(optimizer, "global_grad_statistics", broken)


def weight_decay_on_vectors():
    """T28: biases and norms decay like matrices."""
    original = optimizer.get_param_groups

    def broken(*arguments, **kwargs):
        groups = original(*arguments, **kwargs)
        for group in groups:
            group["wd_mult"] = 1.0
        return groups

    return mock.patch.object(optimizer, "get_param_groups", broken)


def _batch_altered(alter: Callable[[dict[str, Tensor], dict[str, Tensor], int, int], None]):
    """`alter(part, whole, cp size, cp rank)` changes this rank's part of each batch, in place."""
    original = batches.get_batch_on_this_cp_rank

    def broken(batch, cp_group=None):
        part = dict(original(batch, cp_group))
        alter(part, batch, group_size(cp_group), group_rank(cp_group))
        return part

    return mock.patch.object(batches, "get_batch_on_this_cp_rank", broken)


def contiguous_split():
    """T14: each rank takes one contiguous part of the tokens (and the rest as it should be)."""

    def alter(part, whole, size, rank):
        part["tokens"] = whole["tokens"].chunk(size, dim=1)[rank]

    return _batch_altered(alter)


def local_positions():
    """T16: each rank counts its own tokens."""

    def alter(part, whole, size, rank):
        part["position_ids"] = torch.arange(part["tokens"].size(1)).expand_as(part["tokens"])

    return _batch_altered(alter)


def labels_shifted_after_split():
    """T18: labels are the next tokens of this rank's part."""

    def alter(part, whole, size, rank):
        part["labels"] = torch.cat((part["tokens"][:, 1:], part["labels"][:, -1:]), dim=1)

    return _batch_altered(alter)


def documents_joined():
    """T19: attention crosses the ends of documents."""
    original = batches.packed_documents
    return mock.patch.object(
        batches, "packed_documents", lambda starts, padding=0: original(torch.zeros_like(starts), padding)
    )


def documents_of_local_lengths():
    """T19: the documents' boundaries are taken for those of this rank's tokens, whatever rank the keys are from."""
    original = blocks.piece_on_rank
    return mock.patch.object(blocks, "piece_on_rank", lambda place, cp_size, cp_rank: original(place, cp_size, 0))


def not_reduced_over_context():
    """T17: each context parallel rank keeps the gradients of its own tokens."""
    from megatron_lite.training import setup

    return mock.patch.object(setup, "wrap_data_parallel", lambda model, *arguments, **options: model)


def loss_reported_of_one_rank():
    """T21: the loss that is shown is not summed over the context parallel ranks."""
    original = step.train_step

    def broken(*arguments, dp_cp_group, **kwargs):
        with mock.patch.object(step, "sum_over", return_value=None):
            return original(*arguments, dp_cp_group=dp_cp_group, **kwargs)

    return mock.patch("tests.parallel.layouts.train_step", broken)


def micro_batch_means_of_one_rank():
    """T17, T22: the mean over a micro-batch is taken over the tokens of one context parallel rank."""
    original = step.loss_weights
    return mock.patch.object(
        step, "loss_weights", lambda batches, total, size, per_token, group: original(batches, total, size, per_token)
    )


def router_not_summed():
    """T1 for routers: each tensor parallel rank routes tokens of its own, and its gradient is taken to be complete."""
    return _undeclared(lambda name: "router" in name)


def shared_gate_not_summed():
    """T1 for the gate of the shared experts, under sequence parallelism."""
    return _undeclared(lambda name: "shared_experts.gate" in name)


def experts_not_summed_over_their_copies():
    """T39: expert data parallel ranks keep the gradients of their own tokens."""
    return mock.patch("megatron_lite.distributed.data_parallel._wrap_experts", return_value=None)


def experts_scaled_by_their_ranks():
    """T39: gradients of experts are averaged over the data parallel ranks of dense parameters: EP times too small."""
    original = FSDPModule.set_gradient_divide_factor

    def broken(self, factor):
        original(self, self.config.expert_model_parallel_size if isinstance(self, experts.GroupedMLP) else factor)

    return mock.patch.object(FSDPModule, "set_gradient_divide_factor", broken)


def load_counted_by_one_rank():
    """T43: the balance losses use the choices of this rank's tokens alone."""
    return mock.patch.object(load_balancing, "sum_over", lambda counts, group: counts)


def balance_losses_of_every_replica():
    """T43: the balance losses are averaged over micro-batches, but not over data parallel ranks."""
    original = auxiliary_losses.begin_step

    def broken(scale):
        original(scale * dist.get_world_size())

    return mock.patch.object(step.auxiliary_losses, "begin_step", broken)


def _scores_averaged(tokens_of: Callable[[float, float], float]):
    """`tokens_of(tokens, counted tokens)` are those that a balance loss averages the scores over."""
    original = load_balancing.balance_share
    return mock.patch.object(
        load_balancing,
        "balance_share",
        lambda sums, counts, topk, tokens, counted: original(sums, counts, topk, tokens_of(tokens, counted), counted),
    )


def scores_averaged_by_one_rank():
    """T43: the balance losses average the scores over this rank's tokens: the gradient is TP * CP times too large."""
    return _scores_averaged(lambda tokens, counted: tokens / group_size(get_group("tp_cp")))


def scores_averaged_over_replicas():
    """T43: the global loss averages a replica's scores over the tokens of all: the gradient is DP times too small."""
    return _scores_averaged(lambda tokens, counted: counted)


def global_counts_of_earlier_steps():
    """T43: the counts of the global loss are not set back when a step begins."""
    return mock.patch.object(auxiliary_losses, "current_step", return_value=torch.zeros((), dtype=torch.int64))


def expert_bias_by_one_rank():
    """T45: each rank moves the expert bias by the load it saw."""
    return mock.patch.object(statistics, "sum_over", lambda counts, group: counts)


def expert_bias_by_micro_batch():
    """T45: the expert bias moves before each micro-batch, not once a step."""
    original = step.forward_step

    def broken(model, batch, decoder_input=None):
        statistics.update_expert_bias(model, get_group("tp_dp_cp"))
        return original(model, batch, decoder_input)

    return mock.patch.object(step, "forward_step", broken)


def expert_bias_by_evaluation():
    """T45: the tokens of an evaluation count as if they had been trained on."""
    original = TopKRouter.forward

    def broken(self, hidden):
        weights, indices = original(self, hidden)
        if not self.training and self.step_tokens_per_expert is not None:
            self.step_tokens_per_expert += torch.bincount(indices.flatten(), minlength=self.num_experts)
        return weights, indices

    return mock.patch.object(TopKRouter, "forward", broken)


def router_in_bfloat16():
    """T42: logits, scores and choices in bfloat16, whatever the input's dtype."""
    return mock.patch.object(TopKRouter, "_compute_dtype", return_value=torch.bfloat16)


def expert_bias_in_weights():
    """The bias that decides about experts also enters the weights of their outputs."""
    original = routing.route

    def broken(logits, topk, *, expert_bias=None, **options):
        biased = logits if expert_bias is None else logits + expert_bias.to(logits.dtype)
        return original(biased, topk, expert_bias=expert_bias, **options)

    return mock.patch.object(routing, "route", broken)


def fc2_bias_on_every_rank():
    """T5 for experts: each expert tensor parallel rank adds the bias of the second layer."""
    original = experts.GroupedMLP.__init__

    def broken(self, *arguments, **options):
        original(self, *arguments, **options)
        self.adds_bias2 = True

    return mock.patch.object(experts.GroupedMLP, "__init__", broken)


def shared_experts_divided():
    """T46: the output is taken for one that every tensor parallel rank adds to the sum of the routed experts."""
    original = shared_experts.SharedExperts.forward
    return mock.patch.object(
        shared_experts.SharedExperts,
        "forward",
        lambda self, hidden_states: original(self, hidden_states) / group_size(get_group("tp")),
    )


def shared_experts_not_reduced():
    """T46: the output is left to a reduction that the layer does not do."""
    original = shared_experts.SharedExperts.__init__

    def broken(self, *arguments, **options):
        original(self, *arguments, **options)
        self.linear_fc2.communicates = False

    return mock.patch.object(shared_experts.SharedExperts, "__init__", broken)


def tokens_dispatched_without_gradient():
    """T47: tokens are sent by a raw collective, whose result knows no gradient: upstream layers learn nothing from it.

    Detached by hand, as newer releases of torch give the functional collectives a gradient of their own.
    """
    original = token_dispatcher.TokenDispatcher.dispatch
    return mock.patch.object(
        token_dispatcher.TokenDispatcher,
        "dispatch",
        lambda self, tokens, probs, indices: original(self, tokens.detach(), probs, indices),
    )


@contextmanager
def combined_without_gradient():
    """T47: so are the experts' results, which leaves the experts without any gradient."""
    gathering, exchanging = token_dispatcher.AllGatherTokenDispatcher, token_dispatcher.AlltoAllTokenDispatcher
    with _detached_in_combine(gathering), _detached_in_combine(exchanging):
        yield


def _detached_in_combine(dispatcher: type[token_dispatcher.TokenDispatcher]):
    original = dispatcher.combine
    return mock.patch.object(dispatcher, "combine", lambda self, rows, state: original(self, rows.detach(), state))


def tokens_routed_on_every_rank():
    """T3: without sequence parallelism all tensor parallel ranks route all tokens, and each counts as its own."""
    from megatron_lite.transformer.moe import moe_layer

    def split(tokens, group=None):
        return tokens

    def gather(tokens, tensor_parallel_output_grad=True, group=None):
        return tokens

    return mock.patch.multiple(
        moe_layer, scatter_to_sequence_parallel_region=split, gather_from_sequence_parallel_region=gather
    )


def probabilities_by_a_raw_collective():
    """T47: the routers' weights travel to the experts by a collective without a backward."""
    original = token_dispatcher.all_to_all

    def broken(group, rows, *counts):
        received = original(group, rows, *counts)
        return received.detach() + 0.0 * received if rows.dim() == 1 else received

    return mock.patch.object(token_dispatcher, "all_to_all", broken)


def shared_experts_reduced_twice():
    """T46: the shared experts' output, complete already, is summed over the tensor parallel ranks once more."""
    original = shared_experts.SharedExperts.forward

    def broken(self, hidden_states):
        return mappings.reduce_from_tensor_model_parallel_region(original(self, hidden_states))

    return mock.patch.object(shared_experts.SharedExperts, "forward", broken)


def sequences_counted_together():
    """T43: the balance loss of each sequence uses the load of all of them."""
    original = load_balancing.balance_share

    def broken(score_sums, counts, *sizes):
        return original(score_sums, counts.float().mean(0) if counts.dim() == 2 else counts, *sizes)

    return mock.patch.object(load_balancing, "balance_share", broken)


def z_loss_of_own_tokens():
    """T43: the z-loss is a mean over this rank's tokens, and then summed over the ranks."""
    original = load_balancing.z_loss_share
    return mock.patch.object(
        load_balancing, "z_loss_share", lambda logits, tokens: original(logits, logits.shape[:-1].numel())
    )


def micro_batches_mixed_up():
    """T32: all stages but the first look at the first micro-batch, whatever is on its way."""
    original = pipelined._ChunkOfMicroBatch.forward

    def broken(self, received, number):
        return original(self, received, number if self.chunk.pre_process else number * 0)

    return mock.patch.object(pipelined._ChunkOfMicroBatch, "forward", broken)


def loss_of_another_stage():
    """The loss stays on the rank of the last stage; another one reports its own."""
    return mock.patch.object(
        step, "losses_of_all", lambda loss, tokens, dp_cp_group, pp_group: (loss, tokens.clamp(min=1.0))
    )


def tied_gradients_not_summed():
    """T33: the embeddings and their copy as output layer each keep their own gradient."""
    return mock.patch(f"{FINALIZE}.sum_tied_gradients", return_value=None)


def tied_gradients_averaged():
    """T33: the sum of the two gradients became a mean, on both sides."""
    original = tied_embeddings.sum_tied_gradients

    def broken(chunks, group):
        original(chunks, group)
        tied = tied_embeddings.tied_weights(chunks)
        for parameter in () if tied is None else tied:
            if parameter is not None:
                tied_embeddings._gradient(parameter).mul_(0.5)

    return mock.patch(f"{FINALIZE}.sum_tied_gradients", broken)


def tied_copy_in_norm():
    """T33: the copy of the embeddings is counted in the norm like any other parameter."""
    original = optimizer.MegatronOptimizer.__init__

    def broken(self, *arguments):
        original(self, *arguments)
        self._counted |= set(self._copies)

    return mock.patch.object(optimizer.MegatronOptimizer, "__init__", broken)


def tied_copy_initialized_apart():
    """T33: the copy of the embeddings is drawn under a name of its own."""
    original = parameters.named_parameter_specs

    def broken(model):
        return {name: dataclasses.replace(spec, copy_of=None) for name, spec in original(model).items()}

    return mock.patch.object(parameters, "named_parameter_specs", broken)


def _scale_of_balance_losses(change: Callable[[Tensor], Tensor]):
    original = auxiliary_losses.begin_step
    return mock.patch.object(step.auxiliary_losses, "begin_step", lambda scale: original(change(scale)))


def balance_losses_of_the_last_stage():
    """T34: only experts in the last stage, where the loss is, are balanced."""
    last = group_size(get_group("pp")) - 1
    return _scale_of_balance_losses(lambda scale: scale * (get_pipeline_model_parallel_rank() == last))


def balance_losses_shared_by_stages():
    """T34: balance losses are divided by the number of stages."""
    return _scale_of_balance_losses(lambda scale: scale / group_size(get_group("pp")))


def expert_bias_of_the_first_chunk():
    """T45: of the model chunks of a rank only the first has its expert bias moved."""
    original = step.update_expert_bias
    return mock.patch.object(step, "update_expert_bias", lambda chunks, group: original(chunks[:1], group))


def recomputation_counted():
    """T37: experts count a token again when its layer is computed again for the backward pass."""
    return mock.patch.object(statistics, "is_recomputation", return_value=False)


def norm_of_one_chunk():
    """T38: the norm is that of the rank's first chunk."""
    original = optimizer.get_megatron_optimizer

    def broken(config, model_chunks):
        made = original(config, model_chunks)
        made._counted &= {name for name, _ in model_chunks[0].named_parameters()}
        return made

    return mock.patch("tests.parallel.layouts.get_megatron_optimizer", broken)


def latent_norms_not_summed():
    """T1: norms of the latents, behind down-projections, are taken to have complete gradients."""
    return _undeclared(lambda name: name.endswith(("q_layernorm.weight", "kv_layernorm.weight")))


def down_projections_not_summed():
    """T1: the same for the down-projections themselves."""
    return _undeclared(lambda name: "down_proj" in name)


def joining_projection_not_summed():
    """T1: the same for the projection that joins embedding and hidden state in multi-token prediction."""
    return _undeclared(lambda name: "eh_proj" in name)


def key_positions_not_copied():
    """T3: the rotated part of the keys, which all heads share, gets the gradient of this rank's heads alone."""
    return mock.patch.object(multi_latent_attention, "copy_to_tensor_model_parallel_region", lambda x, group: x)


def future_shifted_after_split():
    """T18: the tokens further on are looked for in this rank's part of the sequence."""
    original = batches.prepare

    def broken(batch, cp_group=None, padding=0, depths=0):
        mine = original(batch, cp_group, padding)
        text = (mine["tokens"], mine["labels"], mine["loss_mask"])
        return mine | dict(zip(batches.FUTURE, batches.future_tokens(*text, depths), strict=True))

    return mock.patch.object(batches, "prepare", broken)


def future_of_other_documents():
    """T19: the tokens further on are taken from the next document, too."""
    original = batches.future_tokens
    return mock.patch.object(
        batches,
        "future_tokens",
        lambda tokens, labels, mask, depths, starts=None: original(tokens, labels, mask, depths),
    )


def further_losses_by_all_tokens():
    """T17: the losses of multi-token prediction are divided by the tokens that have a next token's loss."""
    original = step.count_tokens

    def broken(micro_batches, group):
        count = original(micro_batches, group)
        return count[:1].expand_as(count)

    return mock.patch.object(step, "count_tokens", broken)


def sinks_counted_twice():
    """T26: attention sinks are counted by the optimizer once more than their rank holds them."""
    original = optimizer.MegatronOptimizer.step

    def broken(self):
        sinks = [p.grad for name, p in self.named_parameters.items() if "softmax_offset" in name]
        count = optimizer.global_grad_statistics
        twice = mock.patch.object(
            optimizer,
            "global_grad_statistics",
            lambda grads, *rest: count([*grads, *map(parameters.local, sinks)], *rest),
        )
        with twice:
            return original(self)

    return mock.patch.object(optimizer.MegatronOptimizer, "step", broken)


def sinks_of_other_heads():
    """Heads that come from other ranks in an all-to-all get the sinks of the first ones."""
    return mock.patch.object(cp_attention, "group_rank", return_value=0)


def sinks_without_a_place():
    """The sinks are left out of the log of the denominator, from which the backward pass takes the probabilities."""
    original = block_attention.RunningAttention.finish

    def broken(self, sinks):
        before = self.log_sum
        out, _ = original(self, sinks)
        return out, before

    return mock.patch.object(block_attention.RunningAttention, "finish", broken)


def gates_by_group():
    """The gates of a tensor parallel rank that shares a query group are those of the group's first queries."""
    original = qkv_projection.SharedGroupProjection.__init__

    def broken(self, config, group):
        original(self, config, group)
        queries, gates = self.query_rows
        own = gates.stop - gates.start
        begin = gates.start - group_rank(group) % (group_size(group) // config.num_query_groups) * own
        self.query_rows = [queries, slice(begin, begin + own)]

    return mock.patch.object(qkv_projection.SharedGroupProjection, "__init__", broken)


def last_part_not_multiplied():
    """T31: the ring of the gather ends one step early, without the part of the next rank."""
    original = linear.gather_then_multiply

    def broken(x, weight, bias, group, *arguments, **options):
        product, gathered = original(x, weight, bias, group, *arguments, **options)
        parts = list(product.chunk(group.size()))
        missing = (group.rank() + 1) % group.size()
        parts[missing] = torch.zeros_like(parts[missing])
        return torch.cat(parts), gathered

    return mock.patch.object(linear, "gather_then_multiply", broken)


def part_of_another_rank_added():
    """T31: to the sum that has come home a rank adds its product of the next rank's positions in place of its own."""
    original = linear.multiply_then_reduce_scatter

    def broken(x, weight, group, way):
        own, other = (x.chunk(group.size())[(group.rank() + step) % group.size()] for step in (0, 1))
        return original(x, weight, group, way) + torch.nn.functional.linear(other - own, weight)

    return mock.patch.object(linear, "multiply_then_reduce_scatter", broken)


def sums_one_rank_too_far():
    """T31: the ring of the reduce-scatter takes one step too many."""
    original = linear.multiply_then_reduce_scatter

    def broken(x, weight, group, way):
        return collectives.wait(collectives.start_shift(original(x, weight, group, way), group))

    return mock.patch.object(linear, "multiply_then_reduce_scatter", broken)


def gathered_gradient_of_one_rank():
    """T31: the weight of a row layer learns from the positions of this rank alone, in the place of all of them."""
    original = linear.gather_then_multiply

    def broken(x, weight, bias, group, way, *, keep=False):
        product, gathered = original(x, weight, bias, group, way, keep=keep)
        return product, None if gathered is None else torch.cat([x] * group.size())

    return mock.patch.object(linear, "gather_then_multiply", broken)


MUTATIONS = {
    function.__name__: function
    for function in (
        norms_not_summed,
        row_bias_not_summed,
        qk_norms_not_summed,
        shared_group_not_summed,
        partial_gradients_averaged,
        row_bias_on_every_rank,
        local_softmax_denominator,
        padded_vocabulary_in_softmax,
        mean_of_local_means,
        tokens_counted_locally,
        last_micro_batch_not_reduced,
        gradients_averaged_over_data_parallel,
        replicas_counted_in_norm,
        local_norm,
        weight_decay_on_vectors,
        contiguous_split,
        local_positions,
        labels_shifted_after_split,
        documents_joined,
        documents_of_local_lengths,
        not_reduced_over_context,
        loss_reported_of_one_rank,
        micro_batch_means_of_one_rank,
        router_not_summed,
        shared_gate_not_summed,
        experts_not_summed_over_their_copies,
        experts_scaled_by_their_ranks,
        load_counted_by_one_rank,
        balance_losses_of_every_replica,
        scores_averaged_by_one_rank,
        scores_averaged_over_replicas,
        global_counts_of_earlier_steps,
        expert_bias_by_one_rank,
        expert_bias_by_micro_batch,
        expert_bias_by_evaluation,
        router_in_bfloat16,
        expert_bias_in_weights,
        fc2_bias_on_every_rank,
        shared_experts_divided,
        shared_experts_not_reduced,
        tokens_dispatched_without_gradient,
        combined_without_gradient,
        tokens_routed_on_every_rank,
        probabilities_by_a_raw_collective,
        shared_experts_reduced_twice,
        sequences_counted_together,
        z_loss_of_own_tokens,
        micro_batches_mixed_up,
        loss_of_another_stage,
        tied_gradients_not_summed,
        tied_gradients_averaged,
        tied_copy_in_norm,
        tied_copy_initialized_apart,
        balance_losses_of_the_last_stage,
        balance_losses_shared_by_stages,
        expert_bias_of_the_first_chunk,
        recomputation_counted,
        norm_of_one_chunk,
        latent_norms_not_summed,
        down_projections_not_summed,
        joining_projection_not_summed,
        key_positions_not_copied,
        future_shifted_after_split,
        future_of_other_documents,
        further_losses_by_all_tokens,
        sinks_counted_twice,
        sinks_of_other_heads,
        sinks_without_a_place,
        gates_by_group,
        last_part_not_multiplied,
        part_of_another_rank_added,
        sums_one_rank_too_far,
        gathered_gradient_of_one_rank,
    )
}
