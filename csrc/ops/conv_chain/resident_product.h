// The matrix products of the resident chain (resident.h): a stage's convolution forward, or backward its transpose.
//
// A product is an implicit matrix product: 16 rows are (sample, pixel) pairs of one class, whose windows read taps at
// the same offsets (`Windows` of the CPU's conv_chain, classes merged where a tap outside the map may be read as
// zeros); 16 columns of the left operand are two chunks of 8 channels, 8 columns of the right one a chunk of the
// result's channels. The weights serve both passes: the backward pass transposes them as it loads them.
// Numbers are summed in one order whatever the samples of a block are.
#pragma once

#include "mgebm/warp.h"
#include "ops/conv_chain/resident_params.h"

namespace mgebm {

// Chunks of 16 bytes lie so that eight neighbouring pixels, whatever their depth, are in different banks. A depth is 1,
// 2, 4 or whole eights of chunks: within such an eight, chunk c is at the address of chunk 0 xor 16 c.
MG_BODY int32_t swizzled(int32_t chunk) { return chunk ^ ((chunk >> 3 ^ chunk >> 6) & 7); }
MG_BODY uint32_t chunk_at(int32_t start, int32_t chunk) { return static_cast<uint32_t>(start + 16 * swizzled(chunk)); }

// The same for the weights, in groups of eight rows: `row` of 8 outputs of a tap, each `depth` chunks long.
MG_BODY uint32_t weight_at(int32_t start, int32_t group, int32_t row, int32_t depth, int32_t chunk) {
  return static_cast<uint32_t>(start + 16 * (8 * group * depth + swizzled(row * depth + chunk)));
}

template <int kValue>
struct Whole {
  static constexpr int value = kValue;
};

// The products of stage l of a net, by one warp.
template <class Warp>
class ResidentProduct {
 public:
  // A warp's share: some rows of one class by some columns.
  struct Unit {
    int first_row, rows;  // of the class: outputs times samples
    int first_output, outputs, first_tap, last_tap;
    int first_column, columns;  // in chunks; columns: of all
  };

  template <bool kBackward>
  MG_BODY static Unit unit_of(const Warp& warp, const ResidentNet& net, int l, int tile, int first_column,
                              int columns) {
    const ResidentWindows& windows = kBackward ? net.stages.at[l].backward : net.stages.at[l].forward;
    int c = 0;
    while (entry(warp, windows.first_tile, c + 1) <= tile) ++c;
    const int first_output = entry(warp, windows.first_output, c);
    const int outputs = entry(warp, windows.first_output, c + 1) - first_output;
    return {(tile - entry(warp, windows.first_tile, c)) * windows.tile_rows,
            outputs * net.samples,
            first_output,
            outputs,
            entry(warp, windows.first_tap, c),
            entry(warp, windows.first_tap, c + 1),
            first_column,
            columns};
  }

  template <bool kBackward, int kTiles, int kPairs, typename Finish>
  MG_BODY static void add_up(const Warp& warp, const ResidentNet& net, int l, const Unit& unit, const Finish& finish) {
    const ResidentStage& stage = net.stages.at[l];
    const ResidentWindows& windows = kBackward ? stage.backward : stage.forward;
    const int32_t* const base = table(net, windows.base);
    const int32_t* const inside = table(net, windows.inside);
    const int read_pixels = kBackward ? stage.out_pixels : stage.in_pixels;
    const int depth = kBackward ? stage.out_chunks : stage.in_chunks;  // chunks of a pixel that is read
    const int32_t map = kBackward ? stage.map : stage.reads;

    PerLane<Row> from[kTiles];
    PerLane<Accumulator> sum[kTiles][2 * kPairs];
    warp.each([&](int lane) {
      MG_UNROLL
      for (int m = 0; m < kTiles; ++m) {
        int row = unit.first_row + 16 * m + lane % 16;
        if (row >= unit.rows) row = unit.rows - 1;
        const int i = unit.first_output + row % unit.outputs;
        from[m][lane] = {(row / unit.outputs * read_pixels + base[i]) * depth, static_cast<uint32_t>(inside[i])};
        MG_UNROLL
        for (int j = 0; j < 2 * kPairs; ++j) sum[m][j][lane] = {};
      }
    });
    PerLane<uint32_t> left[kTiles], right[kPairs];
    // A lane's addresses of chunk `chunk` of a tap. Each lane loads one half of the 16 channels: the lanes of the left
    // operand's second half are 16 and on, those of the right one's every other eight.
    const auto point_left = [&](int lane, int tap, int chunk) {
      const int pixel = entry(warp, windows.taps, 2 * tap), nth = tap - unit.first_tap;
      MG_UNROLL
      for (int m = 0; m < kTiles; ++m) {
        const bool reads = nth >= 32 || (from[m][lane].taps >> nth & 1u);
        left[m][lane] = reads ? chunk_at(map, from[m][lane].start + pixel * depth + chunk) : zeros(net, chunk);
      }
    };
    const auto point_right = [&](int lane, int tap, int chunk) {
      const int row = entry(warp, windows.taps, 2 * tap + 1) * stage.out_chunks;
      MG_UNROLL
      for (int j = 0; j < kPairs; ++j) {
        int column = unit.first_column + 2 * j + lane / 16;
        if (column >= unit.columns) column = unit.columns - 1;
        right[j][lane] = kBackward ? weight_at(stage.weights, row + chunk, lane % 8, stage.in_chunks, column)
                                   : weight_at(stage.weights, row + column, lane % 8, stage.in_chunks, chunk);
      }
    };
    // sum += the products of kSteps times 16 channels, `step` chunks from where the addresses point and on.
    const auto add = [&](auto steps, int step) {
      constexpr int kSteps = decltype(steps)::value;
      PerLane<Operand> a[kSteps][kTiles], b[kSteps][kPairs];
      MG_UNROLL
      for (int k = 0; k < kSteps; ++k) {
        PerLane<uint32_t> at;
        const uint32_t turn = 16u * static_cast<uint32_t>(step + 2 * k);
        const uint32_t down = 128u * static_cast<uint32_t>((step + 2 * k) * stage.in_chunks);
        MG_UNROLL
        for (int m = 0; m < kTiles; ++m) {
          warp.each([&](int lane) { at[lane] = left[m][lane] ^ turn; });
          warp.template load_matrices<false>(a[k][m], at);
        }
        MG_UNROLL
        for (int j = 0; j < kPairs; ++j) {
          warp.each([&](int lane) { at[lane] = kBackward ? right[j][lane] + down : right[j][lane] ^ turn; });
          warp.template load_matrices<kBackward>(b[k][j], at);
        }
      }
      MG_UNROLL
      for (int k = 0; k < kSteps; ++k) {
        MG_UNROLL
        for (int j = 0; j < 2 * kPairs; ++j) {
          MG_UNROLL
          for (int m = 0; m < kTiles; ++m) warp.multiply(sum[m][j], a[k][m], b[k][j / 2], j % 2);
        }
      }
    };
    if (depth == 1) {  // two taps at a time; the last of an odd number is paired with zeros
      for (int tap = unit.first_tap; tap < unit.last_tap; tap += 2) {
        const bool alone = tap + 1 == unit.last_tap;
        warp.each([&](int lane) {
          point_left(lane, lane / 16 && !alone ? tap + 1 : tap, 0);
          point_right(lane, lane / 8 % 2 && !alone ? tap + 1 : tap, 0);
          if (alone && lane / 16) {
            MG_UNROLL
            for (int m = 0; m < kTiles; ++m) left[m][lane] = zeros(net, 0);
          }
        });
        add(Whole<1>(), 0);
      }
    } else {
      MG_NO_UNROLL
      for (int tap = unit.first_tap; tap < unit.last_tap; ++tap) {
        MG_NO_UNROLL
        for (int chunk = 0; chunk < depth; chunk += 8) {
          warp.each([&](int lane) {
            point_left(lane, tap, chunk + lane / 16);
            point_right(lane, tap, chunk + lane / 8 % 2);
          });
          if (depth == 2) {
            add(Whole<1>(), 0);
          } else {
            add(Whole<2>(), 0);
            if (depth > 4) add(Whole<2>(), 4);
          }
        }
      }
    }

    const int32_t* const output = table(net, windows.output);
    finish(warp, [&](const auto& body) {
      warp.each([&](int lane) {
        MG_UNROLL
        for (int m = 0; m < kTiles; ++m) {
          MG_UNROLL
          for (int half = 0; half < 2; ++half) {
            const int row = unit.first_row + 16 * m + 8 * half + lane / 4;
            if (row >= unit.rows) continue;
            const int s = row / unit.outputs, pixel = output[unit.first_output + row % unit.outputs];
            MG_UNROLL
            for (int j = 0; j < 2 * kPairs; ++j) {
              if (unit.first_column + j >= unit.columns) break;
              const float* v = sum[m][j][lane].v + 2 * half;
              body(s, pixel, 8 * (unit.first_column + j) + 2 * (lane % 4), v[0], v[1]);
            }
          }
        }
      });
    });
  }

 private:
  // For each row of a lane: the first chunk of its base pixel, and which taps lie inside the map.
  struct Row {
    int32_t start;
    uint32_t taps;
  };

  MG_BODY static const int32_t* table(const ResidentNet& net, int32_t at) {
    return reinterpret_cast<const int32_t*>(net.memory + at);
  }
  MG_BODY static int entry(const Warp& warp, int32_t at, int i) {
    return warp.template load<int32_t>(static_cast<uint32_t>(at + 4 * i));
  }

  // An address of the zeros at the front of the image; 128 bytes of them stand for a chunk at any swizzle.
  MG_BODY static uint32_t zeros(const ResidentNet& net, int chunk) {
    return static_cast<uint32_t>(net.zero + 16 * (chunk % 8));
  }
};

}  // namespace mgebm
