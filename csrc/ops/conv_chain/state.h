// The state of a chain of convolutions: in and out, dE/dx, and the Langevin update. For *_cpu.cpp files only.
#pragma once

#include "mgebm/noise_block.h"
#include "ops/conv_chain/sweep.h"

namespace mgebm::MGEBM_ISA {

// (samples, elements) <-> [block][element][16]. Lanes past the last sample repeat it, so that they are finite where it
// is.
template <typename T>
static void read_state(const Engine<T>& e) {
  const ConvChainParams& p = e.p;
  const int64_t elements = e.elements();
  e.share_evenly(e.mine() * elements, [&](int64_t i) {
    const int64_t unit = static_cast<int64_t>(e.first_block) * elements + i;
    const int64_t block = unit / elements, element = unit % elements;
    for (int lane = 0; lane < 16; ++lane) {
      const int64_t sample = smaller(16 * block + lane, p.samples - 1);
      e.x[unit * 16 + lane] = p.x[sample * elements + element];
      if (p.mask) e.mask[unit * 16 + lane] = p.mask[sample * elements + element];
    }
  });
  e.share_evenly(16LL * e.mine(), [&](int64_t i) {
    const int64_t lane = 16LL * e.first_block + i;
    e.ids[lane] = sample_key(p.counters, smaller(lane, p.samples - 1)).sample;
  });
}

template <typename T>
static void write_state(const Engine<T>& e, const float* from, float* to) {
  const int64_t elements = e.elements(), first = 16LL * e.first_block;
  e.share_evenly(smaller(16LL * e.last_block, e.p.samples) - first, [&](int64_t i) {
    const int64_t sample = first + i;
    const float* in = from + sample / 16 * elements * 16 + sample % 16;
    for (int64_t element = 0; element < elements; ++element) to[sample * elements + element] = in[element * 16];
  });
}

// Four neighbouring elements, a quad of noise, of a block of samples; slope[j]: dE/dx of element 4 quad + j.
template <typename T>
static void update_quad(const Engine<T>& e, int block, int64_t quad, int count, const float (*slope)[16],
                        const SampleKey& key, int64_t k) {
  alignas(64) uint32_t words[4][16];
  alignas(64) float normal[4][16] = {};
  const LangevinStepNumbers& numbers = e.p.update;
  const LangevinStepCoefficients all = coefficients_of(numbers, k, 0);
  if (all.noise_std != 0.0f || numbers.by_sample) {
    philox_samples(key, static_cast<uint32_t>(quad), e.ids + 16 * block, words);
#pragma omp simd
    for (int i = 0; i < 16; ++i) {
      const Quad q = normals_of({words[0][i], words[1][i], words[2][i], words[3][i]});
      normal[0][i] = q.v0, normal[1][i] = q.v1, normal[2][i] = q.v2, normal[3][i] = q.v3;
    }
    if (!key.valid) {
      for (int i = 0; i < 64; ++i) normal[i / 16][i % 16] = __builtin_nanf("");
    }
  }
  if (numbers.by_sample || numbers.mean) {
    for (int i = 0; i < 16; ++i) {
      const int64_t sample = smaller(16 * block + i, e.p.samples - 1);
      const float* mean = means_of(numbers, sample);
      LangevinStepCoefficients own = coefficients_of(numbers, k, sample);
      for (int j = 0; j < count; ++j) {
        const int64_t element = 4 * quad + j, at = (block * e.elements() + element) * 16 + i;
        if (e.p.mask && !e.mask[at]) continue;
        if (mean) own.reference_mean = mean[element];
        e.x[at] = langevin_step_update(own, e.x[at], slope[j][i], normal[j][i]);
      }
    }
    return;
  }
  for (int j = 0; j < count; ++j) {
    const int64_t at = (block * e.elements() + 4 * quad + j) * 16;
    float* __restrict__ here = e.x + at;
    if (e.p.mask) {
      const uint8_t* held = e.mask + at;
#pragma omp simd
      for (int i = 0; i < 16; ++i) {
        const float value = langevin_step_update(all, here[i], slope[j][i], normal[j][i]);
        here[i] = held[i] ? value : here[i];
      }
    } else {
#pragma omp simd
      for (int i = 0; i < 16; ++i) here[i] = langevin_step_update(all, here[i], slope[j][i], normal[j][i]);
    }
  }
}

// dE/dx from dE/dz_0, and with it the update. The outputs are runs of four pixels, a strip four channels of each; with
// a single channel the four rows of a patch of 4 x 4 pixels take the place of channels, whose lanes would be empty.
template <typename T>
static void edge(const Engine<T>& e, const SampleKey& key, int64_t k) {
  const ConvChainParams& p = e.p;
  const ConvStage& stage = p.stages.at[0];
  const int runs = (p.row + kEdgePixels - 1) / kEdgePixels;  // a row of pixels
  const bool patches = p.rows > 0;
  const int strips = patches ? 1 : (p.channels + kEdgeChannels - 1) / kEdgeChannels;
  const int height = patches ? kEdgeChannels : 1, groups = patches ? (p.rows + height - 1) / height : 1;
  const Source<T, false> upstream{e.kept[0].h, stage.out_pixels, e.kept[0].depth};
  convolve(e, stage.backward, upstream, {stage.backward_weights, stage.backward_rows, strips},
           [&](int block, int output, int strip, float* tile) {
             alignas(64) float slope[16][16];
             transpose(tile, kTileWidth, slope);
             const int column = output % runs * kEdgePixels, row = output / runs;
             const int first = row % groups * height;  // row of a patch's first pixels in its plane
             for (int c = 0; c < kEdgeChannels; ++c) {
               const int channel = strip * kEdgeChannels + c;
               if (patches ? first + c >= p.rows : channel >= p.channels) break;
               const int64_t element = patches ? (row / groups * p.rows + first + c) * p.row + column
                                               : static_cast<int64_t>(channel) * p.pixels + row * p.row + column;
               if (e.fused()) {
                 update_quad(e, block, element / 4, 4, slope + kEdgePixels * c, key, k);
                 continue;
               }
               float* out = e.dx + (block * e.elements() + element) * 16;
               const int count = p.row - column;
               for (int j = 0; j < count && j < kEdgePixels; ++j) {
                 store(out + 16 * j, load(slope[kEdgePixels * c + j]));
               }
             }
           });
  if (e.fused() || p.gradient) return;
  const int64_t quads = (e.elements() + 3) / 4;
  e.share_evenly(e.mine() * quads, [&](int64_t unit) {
    const int block = e.first_block + static_cast<int>(unit / quads);
    const int64_t quad = unit % quads;
    const float* slope = e.dx + (block * e.elements() + 4 * quad) * 16;
    update_quad(e, block, quad, static_cast<int>(smaller(4, e.elements() - 4 * quad)),
                reinterpret_cast<const float (*)[16]>(slope), key, k);
  });
}

}  // namespace mgebm::MGEBM_ISA
