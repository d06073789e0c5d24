// SPDX-License-Identifier: Apache-2.0
#include "alignment.h"

#include "kernels.h"

namespace qkv::cuda {

void align(const Alignment& x, Pool& pool, Staging& staging) {
  const int64_t states = x.heads * x.keys, scores = states * x.rows, bytes = scores * itemsize(x.dtype);
  if (scores == 0) return;
  if (x.heads > INT32_MAX || scores > int64_t{INT32_MAX} * 64) throw Refusal{"more than 2^31 blocks of keys"};
  Stream* const stream = staging.stream();
  const int64_t state_bytes = states * static_cast<int64_t>(sizeof(double)), chunk_bytes = x.chunk ? bytes : 0;
  const Buffer energy(pool, bytes, stream), state(pool, state_bytes, stream), chunk(pool, chunk_bytes, stream);
  const Buffer top(pool, chunk_bytes, stream), share(pool, chunk_bytes, stream);
  AlignArgs args{x, top.data(), share.data()};
  args.problem.energy = energy.data();
  args.problem.state = reinterpret_cast<double*>(state.data());
  if (x.chunk) args.problem.chunk = chunk.data();
  staging.upload(x.energy, bytes, energy.data());
  staging.upload(x.state, state_bytes, state.data());
  if (x.chunk) staging.upload(x.chunk, bytes, chunk.data());
  check(align_table(x.dtype).align(args, stream), "launching the alignment");
  check(synchronize(stream), "computing");  // what went wrong is known before anything is written
  staging.download(energy.data(), bytes, x.energy);
  staging.download(state.data(), state_bytes, x.state);
  if (x.chunk) staging.download(chunk.data(), bytes, x.chunk);
}

}  // namespace qkv::cuda
