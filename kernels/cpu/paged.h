// The pool of key and value blocks and one step's rows, as the C side sees them.
//
// A pool is [blocks, Hkv, L, 2, B, D]; a tile is the [B, D] of one block, head, layer and K or V: contiguous, V
// right behind K. Kernels walk a sequence in spans of 16 tokens, which never cross a block (B % 16 == 0).
#pragma once

#include "simd.h"

constexpr int kSpan = 16;

struct KvPool {  // mirrored by kernels/cpu/library.py; strides in elements
  void* data;
  int64_t block_stride, head_stride, layer_stride;
  int64_t kv_heads, block_tokens, head_dim;
};

struct Batch {  // mirrored by kernels/cpu/library.py
  const int64_t* positions;     // [rows]
  const int64_t* slots;         // [rows]
  const int32_t* query_start;   // [sequences + 1]
  const int32_t* context_lens;  // [sequences]
  const int32_t* block_tables;  // [sequences][table_stride]
  int64_t table_stride, rows, sequences, decodes;
};

struct Query {  // q [rows, heads, D], D contiguous
  const void* data;
  int64_t row_stride, heads;
  float scale;
};

// The tiles of one sequence, head and layer; of its tokens those of one part, [begin, end), begin a multiple of 16.
template <class T>
struct Tiles16 {
  const T* base;
  const int32_t* table;
  int64_t block_stride, block_tokens, head_dim, begin, end;
  int64_t next = 0;  // elements from here to the tiles that are read behind these: those of another head, if any

  Tiles16(const KvPool& kv, const Batch& batch, long sequence, long head, long layer, long begin, long end)
      : base(static_cast<const T*>(kv.data) + head * kv.head_stride + layer * kv.layer_stride),
        table(batch.block_tables + sequence * batch.table_stride),
        block_stride(kv.block_stride),
        block_tokens(kv.block_tokens),
        head_dim(kv.head_dim),
        begin(begin),
        end(end) {}

  // Keys of the 16 tokens from `token` on, which is a multiple of 16; the values lie value_offset() further.
  const T* keys(long token) const {
    return base + table[token / block_tokens] * block_stride + token % block_tokens * head_dim;
  }
  // What is read so many tokens later than those from `token` on: behind the part, what is next.
  const T* keys_ahead(long token, long distance) const {
    const long ahead = token + distance;
    if (ahead < end) return keys(ahead);
    const long behind = begin + ahead - (end + kSpan - 1) / kSpan * kSpan;
    return keys(behind < end ? behind : begin) + next;
  }
  long value_offset() const { return block_tokens * head_dim; }
};
