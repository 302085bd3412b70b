// A unit of work is one plane: it is read once, row by row, and stays in L1 while every level is made from it.
#include <omp.h>

#include <cstddef>
#include <new>

#include "mgebm/cpu.h"
#include "ops/pyramid.h"

namespace mgebm::MGEBM_ISA {
namespace {

// columns[w / factor] += row[w]; the factors of the usual ladders are unrolled.
template <int kFactor, typename Source, typename Sum>
void add_groups(const Source* __restrict__ row, Sum* __restrict__ columns, int64_t count, int64_t factor) {
  const int64_t f = kFactor ? kFactor : factor;
  for (int64_t i = 0; i < count; ++i) {
    Sum sum = columns[i];
    for (int64_t j = 0; j < f; ++j) sum += static_cast<Sum>(row[i * f + j]);
    columns[i] = sum;
  }
}

template <typename Source, typename Sum>
void add_row(const Source* row, Sum* columns, int64_t count, int64_t factor) {
  switch (factor) {
    case 1:
      return add_groups<1>(row, columns, count, factor);
    case 2:
      return add_groups<2>(row, columns, count, factor);
    case 3:
      return add_groups<3>(row, columns, count, factor);
    case 4:
      return add_groups<4>(row, columns, count, factor);
    default:
      return add_groups<0>(row, columns, count, factor);
  }
}

// sums (extent `to`) <- block sums of `from`. Rows of a block are first added up over the full width: that loop
// vectorises whatever the factor, and leaves one grouping pass a block row.
template <typename Source, typename Sum>
void block_sums(const Source* source, const Extent& from, Sum* sums, const Extent& to, Sum* row_sums) {
  const int64_t fd = from.depth / to.depth, fh = from.height / to.height, fw = from.width / to.width;
  for (int64_t d = 0; d < to.depth; ++d) {
    for (int64_t h = 0; h < to.height; ++h) {
      Sum* out = sums + (d * to.height + h) * to.width;
      for (int64_t w = 0; w < to.width; ++w) out[w] = 0;
      for (int64_t w = 0; w < from.width; ++w) row_sums[w] = 0;
      for (int64_t i = 0; i < fd; ++i) {
        for (int64_t j = 0; j < fh; ++j) {
          const Source* row = source + ((d * fd + i) * from.height + h * fh + j) * from.width;
          Sum* __restrict__ total = row_sums;
#pragma omp simd
          for (int64_t w = 0; w < from.width; ++w) total[w] += static_cast<Sum>(row[w]);
        }
      }
      add_row(row_sums, out, to.width, fw);
    }
  }
}

template <typename Sum>
void write_means(const Sum* __restrict__ sums, float* __restrict__ out, int64_t size, int64_t count) {
#pragma omp simd
  for (int64_t i = 0; i < size; ++i) out[i] = block_mean(sums[i], count);
}

// Throws std::bad_alloc, before any thread is started, where there is no memory for it.
template <typename T>
struct Buffer {
  explicit Buffer(int64_t count) : at(static_cast<T*>(::operator new(sizeof(T) * static_cast<std::size_t>(count)))) {}
  ~Buffer() { ::operator delete(at); }
  Buffer(const Buffer&) = delete;
  Buffer& operator=(const Buffer&) = delete;
  T* const at;
};

template <typename Source, typename Sum>
void pyramid_typed(const PyramidParams& p, int threads) {
  const int64_t pixels = volume(p.extent);
  threads = threads_for(p.planes * pixels, threads);
  const int64_t each = 2 * pixels + p.extent.width;  // a thread's two levels of sums, and its sums of rows
  const Buffer<Sum> buffer(threads * each);
#pragma omp parallel num_threads(threads) if (threads > 1)
  {
    const KeepSubnormals kept;
    Sum* const scratch = buffer.at + omp_get_thread_num() * each;
#pragma omp for schedule(static)
    for (int64_t plane = 0; plane < p.planes; ++plane) {
      const Source* source = static_cast<const Source*>(p.input) + plane * pixels;
      Sum *sums = scratch, *previous = scratch + pixels, *row_sums = scratch + 2 * pixels;
      Extent from = p.extent;
      for (int level = 0; level < p.levels.count; ++level) {
        const Extent to = p.levels.at[level].extent;
        const int64_t size = volume(to);
        if (level == 0) {
          block_sums(source, from, sums, to, row_sums);
        } else {
          block_sums(previous, from, sums, to, row_sums);
        }
        write_means(sums, p.levels.at[level].output + plane * size, size, pixels / size);
        Sum* const finished = sums;
        sums = previous;
        previous = finished;
        from = to;
      }
    }
  }
}

}  // namespace

void pyramid_cpu(const PyramidParams& p, int threads) {
  if (p.input_is_bytes) {
    pyramid_typed<uint8_t, int32_t>(p, threads);
  } else {
    pyramid_typed<float, double>(p, threads);
  }
}

}  // namespace mgebm::MGEBM_ISA
