#include "matrix.h"

#include <algorithm>
#include <atomic>
#include <memory>
#include <new>
#include <stdexcept>

#include "parallel.h"

namespace epic_quant {
namespace {

constexpr std::size_t round_up(std::size_t n, std::size_t multiple) { return (n + multiple - 1) / multiple * multiple; }

// Memory that a thread keeps between calls, since fresh pages cost more than a small product.
class Scratch {
 public:
  ~Scratch() { release(); }
  char* get(std::size_t nbytes) {
    if (nbytes > nbytes_) {
      release();
      data_ = static_cast<char*>(::operator new(nbytes, std::align_val_t{64}));
      nbytes_ = nbytes;
    }
    return data_;
  }

 private:
  void release() {
    ::operator delete(data_, std::align_val_t{64});
    data_ = nullptr;  // the next allocation may fail
    nbytes_ = 0;
  }
  char* data_ = nullptr;
  std::size_t nbytes_ = 0;
};

Layout layout_of(const Format& format, std::size_t cols, std::size_t num_scales) {
  Layout layout{};
  const CodingRow& row = row_of(format.coding);
  const std::size_t unit = row.unit_codes(), half = unit / 2;
  if (!unit) return layout;
  layout.unit_codes = unit;
  const std::size_t group_size = cols / num_scales;
  if (row.group_codes) {
    layout.kind = group_size < 32 ? Blocks::halves : Blocks::units;
    layout.block_units = layout.block_vectors = 1;
    layout.block_codes = group_size;
    layout.num_units = layout.num_limb_units = cols / unit;
    layout.num_blocks = num_scales;
    return layout;
  }
  const std::size_t group = num_scales == 1 ? round_up(cols, 8 * unit) : group_size;
  layout.kind = group % half ? Blocks::segments : half >= 128 || group % unit ? Blocks::halves : Blocks::units;
  layout.block_units = 1;
  const std::size_t most = format.coding == Coding::trits ? 2 * unit : 128;
  while (layout.kind == Blocks::units && 2 * layout.block_units * unit <= most &&
         group % (2 * layout.block_units * unit) == 0)
    layout.block_units *= 2;
  layout.block_codes = layout.kind == Blocks::halves ? half : layout.block_units * unit;
  layout.block_vectors = layout.block_units * unit / 32;
  layout.num_units = round_up(cols, layout.block_units * unit) / unit;
  layout.num_blocks = layout.num_units * unit / layout.block_codes;
  layout.num_limb_units = layout.num_units;
  if (layout.kind == Blocks::segments) {
    layout.num_blocks = 0;
    for (Segment segment; segment.group < num_scales; segment.next(unit, group_size)) ++layout.num_blocks;
    layout.num_limb_units = layout.num_blocks;
  }
  return layout;
}

std::size_t pack_scratch_nbytes(const Layout& layout) {
  return (layout.padded_cols() + 2 * layout.padded_blocks() + 64) * sizeof(float) +
         layout.num_limb_units * layout.unit_codes;
}

std::size_t product_scratch_nbytes(const StoredMatrix& matrix) {
  const Layout& layout = matrix.layout;
  // Those of the rows, and of one more before they are laid out; as much again for minima.
  const std::size_t kinds = row_of(matrix.format.coding).has_minima ? 2 : 1;
  const std::size_t scales =
      kinds * (kMaxTileRows + 1) * round_up(std::max(layout.num_blocks, matrix.num_scales), 16) * sizeof(float);
  const std::size_t codes = kMaxTileRows * layout.padded_cols();
  const std::size_t tile_codes = std::max(kTileCodes, layout.unit_codes);
  const std::size_t tile = (kMaxTileRows * tile_codes + kMaxTileSums * 8) * sizeof(float);
  return 1024 + scales + std::max(codes, tile);
}

// Bytes of weights below which waking another thread takes longer than it saves.
constexpr std::size_t kThreadNbytes = 32 * 1024;

// Work on rows in pieces of some 32,768 weights, each with scratch for three of its rows.
template <class Work>
void by_rows(std::size_t rows, std::size_t cols, int num_threads, Work&& work) {
  const std::size_t grain = std::max<std::size_t>(1, (1 << 15) / cols);
  parallel_for(rows, grain, num_threads, [&](std::size_t begin, std::size_t end) {
    const std::unique_ptr<float[]> scratch(new float[3 * (cols + 16)]);
    work(begin, end, scratch.get());
  });
}

// The format of a trellis with 16 levels for the upper and 16 for the lower half of an index; codes are values from -128.
Format trellis_format(Format format, const std::vector<int>& levels, int state_bits, unsigned multiplier) {
  if (levels.size() != 32 || state_bits < 8 || state_bits > 16 || multiplier % 2 == 0 || multiplier > 0xFFFF)
    throw std::invalid_argument("a trellis of " + std::to_string(levels.size()) + " levels, " +
                                std::to_string(state_bits) + " state bits and the multiplier " +
                                std::to_string(multiplier) + ", expected 32, 8 to 16, and odd in 16 bits");
  for (int i = 0; i < 32; ++i) {
    if (levels[i] < -127 || levels[i] > 127) throw std::invalid_argument("a level of a trellis is beyond 127");
    (i < 16 ? format.states.high[i] : format.states.low[i - 16]) = static_cast<std::int8_t>(levels[i]);
  }
  for (int i = 0; i < 256; ++i)
    if (const int sum = format.states.high[i / 16] + format.states.low[i % 16]; sum < -127 || sum > 127)
      throw std::invalid_argument("a value of a trellis is " + std::to_string(sum) + ", expected at most 127");
  format.states.state_bits = state_bits, format.states.multiplier = multiplier;
  format.zero = 128, format.low = -128;
  return format;
}

}  // namespace

Format make_format(const std::string& coding, const std::vector<int>& levels, Rounding rounding, float divisor,
                   double gaussian_step, double peak_level, bool either_sign, int state_bits, unsigned multiplier) {
  Format format{};
  int index = 0;
  while (index < kNumCodings && coding != kCodings[index].name) ++index;
  if (index == kNumCodings) throw std::invalid_argument("no kernel knows the coding '" + coding + "'");
  format.coding = static_cast<Coding>(index);
  const CodingRow& row = kCodings[index];
  if (row.is_trellis) return trellis_format(format, levels, state_bits, multiplier);
  const std::size_t most = row.num_bits ? std::size_t{1} << row.num_bits : 3;
  if (levels.empty() || levels.size() > most || levels.front() < -128 || levels.back() > 127 ||
      !std::is_sorted(levels.begin(), levels.end()))
    throw std::invalid_argument(std::to_string(levels.size()) + " levels for " + coding + ", expected up to " +
                                std::to_string(most) + " ascending ones in [-128, 127]");
  format.rounding = rounding;
  format.low = static_cast<float>(levels.front()), format.high = static_cast<float>(levels.back());
  format.divisor = divisor, format.gaussian_step = gaussian_step, format.peak_level = peak_level;
  format.either_sign = either_sign;

  const bool evenly = levels.back() - levels.front() == static_cast<int>(levels.size()) - 1;
  if ((rounding == Rounding::table) == evenly)
    throw std::invalid_argument("levels of " + coding + " are " + std::to_string(levels.front()) + " to " +
                                std::to_string(levels.back()) + (evenly ? " evenly" : " unevenly") +
                                ", which no kernel rounds to so");
  format.zero = evenly ? -levels.front() : 0;
  if (row.num_bits == 8 && format.zero != 128)
    throw std::invalid_argument("levels of " + coding + " are from " + std::to_string(levels.front()) + " on, expected -128");
  if (evenly) return format;
  while (std::size_t{1} << format.table_bits < levels.size()) ++format.table_bits;
  // Products take magnitudes of at most 127.
  if (levels.size() != std::size_t{1} << format.table_bits || format.table_bits < 2 || levels.size() > kMaxTable ||
      !row.num_vectors || row.group_codes || levels.front() < -127)
    throw std::invalid_argument("a table of " + std::to_string(levels.size()) + " levels from " +
                                std::to_string(levels.front()) + " on for " + coding +
                                ", expected 4, 8 or 16 in [-127, 127]");
  for (std::size_t i = 0; i < levels.size(); ++i) {
    format.table[i] = static_cast<std::int8_t>(levels[i]);
    format.levels[i] = static_cast<float>(levels[i]);
    if (i) format.thresholds[i - 1] = (format.levels[i - 1] + format.levels[i]) / 2;
  }
  return format;
}

StoredMatrix make_matrix(const Isa& isa, const Format& format, Rotation rotation, std::size_t rows, std::size_t cols,
                         std::size_t num_scales, std::uint8_t* packed, std::uint16_t* scale) {
  const Layout layout = layout_of(format, cols, num_scales);
  return {format,     rotation,          rows,   cols,  row_nbytes(format.coding, cols),
          num_scales, cols / num_scales, packed, scale, layout,
          isa.kernels(format, layout)};
}

void matmul(const StoredMatrix& matrix, const float* x, std::size_t tokens, float* out, Activations activations,
            int num_threads) {
  const Layout& layout = matrix.layout;
  const Kernels& kernels = matrix.kernels;
  const bool in_fp32 = activations == Activations::fp32 && tokens > 1;
  const int limbs = in_fp32 ? 0 : activations == Activations::int8 ? 1 : kMaxLimbs;
  const auto multiply = tokens > 1 ? (in_fp32 ? kernels.gemm_fp32 : kernels.gemm_int8)
                                   : (limbs == 1 ? kernels.gemv_int8 : kernels.gemv_fp32);

  static thread_local Scratch of_x;
  const std::size_t padded_tokens = tokens > 1 ? round_up(tokens, kTokenLanes) : 1;
  const std::size_t blocks = padded_tokens * layout.padded_blocks();
  const std::size_t values_nbytes = padded_tokens * (in_fp32 ? layout.padded_cols() * sizeof(float)
                                                             : layout.num_limb_units * layout.unit_codes * limbs);
  char* memory = of_x.get(values_nbytes + 2 * blocks * sizeof(float));
  float* scales = reinterpret_cast<float*>(memory + values_nbytes);
  const Product product{matrix, tokens, x,      out,
                        reinterpret_cast<float*>(memory),
                        reinterpret_cast<std::int8_t*>(memory),
                        scales, scales + blocks};

  if (matrix.rows * matrix.row_nbytes * tokens < kThreadNbytes) num_threads = 1;
  parallel_for(tokens, tokens > 4 ? (tokens + 7) / 8 : tokens, num_threads, [&](std::size_t begin, std::size_t end) {
    static thread_local Scratch scratch;
    kernels.pack_activations(product, limbs, begin, end,
                             reinterpret_cast<float*>(scratch.get(pack_scratch_nbytes(layout))));
  });
  // Some pieces more than threads, so that one that is held up does not hold up all.
  std::size_t grain = std::max<std::size_t>(1, matrix.rows / (8 * static_cast<std::size_t>(num_threads)));
  if (tokens > 1) grain = round_up(grain, kMaxTileRows);
  parallel_for(matrix.rows, grain, num_threads, [&](std::size_t begin, std::size_t end) {
    static thread_local Scratch scratch;
    multiply(product, begin, end, scratch.get(product_scratch_nbytes(matrix)));
  });
}

std::size_t quantize(const StoredMatrix& matrix, Element element, const void* weight, int num_threads) {
  std::atomic<std::size_t> first_bad{kAllFinite};
  by_rows(matrix.rows, matrix.cols, num_threads, [&](std::size_t begin, std::size_t end, float* scratch) {
    const std::size_t bad = matrix.kernels.quantize(matrix, element, weight, begin, end, scratch);
    std::size_t known = first_bad.load();
    while (bad < known && !first_bad.compare_exchange_weak(known, bad)) {
    }
  });
  return first_bad;
}

void dequantize(const StoredMatrix& matrix, Element element, void* weight, bool rotated, int num_threads) {
  by_rows(matrix.rows, matrix.cols, num_threads, [&](std::size_t begin, std::size_t end, float* scratch) {
    matrix.kernels.dequantize(matrix, element, weight, rotated, begin, end, scratch);
  });
}

void find_paths(const Isa& isa, const PathSearch& search, std::size_t rows, int num_threads) {
  parallel_for(rows, std::max<std::size_t>(1, (1 << 13) / search.cols), num_threads,
               [&](std::size_t begin, std::size_t end) {
    static thread_local Scratch scratch;
    isa.find_paths(search, begin, end, reinterpret_cast<std::uint16_t*>(scratch.get(search.scratch_nbytes())));
  });
}

void find_compensated_paths(const Isa& isa, const CompensatedSearch& search, std::size_t rows, int num_threads) {
  parallel_for(rows, 1, num_threads, [&](std::size_t begin, std::size_t end) {
    static thread_local Scratch scratch;
    isa.find_compensated_paths(search, begin, end,
                               reinterpret_cast<float*>(scratch.get(isa.compensated_nbytes(search))));
  });
}

void rotate(const Isa& isa, const Rotation& rotation, bool inverse, std::size_t rows, std::size_t cols,
            const float* from, float* to, int num_threads) {
  by_rows(rows, cols, num_threads, [&](std::size_t begin, std::size_t end, float* scratch) {
    isa.rotate(rotation, inverse, cols, from, to, begin, end, scratch);
  });
}

}  // namespace epic_quant
