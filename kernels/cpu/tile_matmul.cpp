#include "tile_matmul.h"

#include "amx.h"
#include "epilogue.h"
#include "groups.h"

// How AMX wants to be fed, on Granite Rapids: a product of 16 rows, 16 outputs and 64 inputs takes 4.3 ns, but to scale its
// sums and add them to y takes 70 vector operations, and near tile instructions a core does those at half its rate: 19 ns.
// So what counts is how few of them there are, and that no instruction waits for another:
// - y stays in vector registers while groups pass by;
// - sums are stored two products after their own, and scaled three after, when they have long been there;
// - shapes are set once for many tiles of outputs (amx.h);
// - half bytes become bytes once for all rows, in panels that stay in the first cache while x passes by from the second;
// - the first rows that meet a panel ask for the next tile's weights.

namespace tiny_llm::TINY_ISA {
namespace {

constexpr int kPanelSlot = 1, kOutputSlot = 2;
constexpr int64_t kPanel = 19 * 64 * kTile;  // bytes: two, for gate and up, and what meets them fit into 48 KB
constexpr int kVectors = kTile / kWidth;

// Groups of a tile of outputs, a byte a weight.
struct Panel {
    Groups groups;
    int64_t count;
    const char* numbers;  // of the first group: its scales and biases; they lie groups.bytes apart
    const char* lines;    // of the first group
    int64_t stride;       // bytes from a group's lines to the next one's
};

void widen(const char* line, const Groups& groups, int64_t count, char* to) {
    for (int64_t g = 0; g < count; ++g, line += groups.lines())
        for (int k = 0; k < groups.size; k += 8, line += kLine, to += 2 * kLine)
            for (int v = 0; v < kLine; v += 4 * kWidth) {
                vu words;
                memcpy(&words, line + v, sizeof words);
                const vu low = words & 0x0f0f0f0f, high = (words >> 4) & 0x0f0f0f0f;
                memcpy(to + v, &low, sizeof low);
                memcpy(to + kLine + v, &high, sizeof high);
            }
}

// `first`: numbers of the first group; what must be widened goes to `room`.
Panel panel_of(const Matrix& m, const Groups& groups, const char* first, int64_t count, char* room) {
    const char* const lines = first + groups.lines();
    if (m.kind == Kind::q8) return {groups, count, first, lines, groups.bytes};
    widen(lines, groups, count, room);
    return {groups, count, first, room, groups.size * kTile};
}

// Where the next group to be multiplied and the next to be scaled lie.
struct Place {
    const char *x, *lines;
    const char* asked;  // the next tile's weights, or null where nobody need ask for them
    const char* numbers;
    const float* scales;
};

// A panel times a block of rows of x.
struct Product {
    Tiles& tiles;
    const Panel& w;
    Place first;
    int64_t lanes, x_stride;  // from group to group, of its scales and its values
    int64_t sums;             // lie so far behind the scales
    int32_t (&ring)[4][kSums];
};

// Sums number S = those of the next group to be multiplied.
template <int S>
[[gnu::always_inline]] inline void multiply_group(const Product& p, Place& at) {
    const int size = p.w.groups.size;
    p.tiles.clear<S>();
    if (size > 64) {
        p.tiles.add<S, 0>(at.x, 64, at.lines);
        p.tiles.add<S, 1>(at.x + 64 * p.lanes, 64, at.lines + 64 * kTile);
    } else {
        p.tiles.add<S, S % 2>(at.x, size, at.lines);
    }
    at.x += p.x_stride, at.lines += p.w.stride;
    if (!at.asked) return;
    for (const char* const end = at.asked + p.w.groups.bytes; at.asked < end; at.asked += kLine)
        __builtin_prefetch(at.asked, 0, 2);
}

// Adds the next group to be scaled to y, in the order that all kernels keep (quantized_matmul.h).
template <int R>
[[gnu::always_inline]] inline void add_group(const Product& p, Place& at, const int32_t* dot, vf (&y)[R][kVectors]) {
    const Kind kind = p.w.groups.scales;
#pragma GCC unroll 4
    for (int v = 0; v < kVectors; ++v) {
        const vf scale = load_any(at.numbers, kind, v * kWidth), bias = load_any(at.numbers, kind, kTile + v * kWidth);
#pragma GCC unroll 16
        for (int r = 0; r < R; ++r) {
            vi sums;
            memcpy(&sums, dot + r * kTile + v * kWidth, sizeof sums);
            const vf scaled = __builtin_convertvector(sums, vf) * splat(at.scales[r]);
            y[r][v] = fma(bias, splat(at.scales[p.sums + r]), fma(scaled, scale, y[r][v]));
        }
    }
    at.numbers += p.w.groups.bytes, at.scales += p.lanes;
}

// S: g % 4
template <int S, int R>
[[gnu::always_inline]] inline void step(const Product& p, int64_t g, Place& at, vf (&y)[R][kVectors]) {
    const auto is_group = [&](int64_t i) { return (uint64_t)i < (uint64_t)p.w.count; };
    if (is_group(g)) multiply_group<S>(p, at);
    if (is_group(g - 2)) p.tiles.store<(S + 2) % 4>(p.ring);
    if (is_group(g - 3)) add_group(p, at, p.ring[(S + 1) % 4], y);
}

// R rows of a product: added to out [R][16], or put there.
template <int R>
[[gnu::noinline]] void multiply(const Product& p, bool adds, float* out) {
    vf y[R][kVectors] = {};
    Place at = p.first;
#pragma GCC unroll 16
    for (int r = 0; adds && r < R; ++r)
        for (int v = 0; v < kVectors; ++v) y[r][v] = load(out + r * kTile + v * kWidth);
    for (int64_t g = 0; g < p.w.count + 3; g += 4) {
        step<0>(p, g, at, y);
        step<1>(p, g + 1, at, y);
        step<2>(p, g + 2, at, y);
        step<3>(p, g + 3, at, y);
    }
#pragma GCC unroll 16
    for (int r = 0; r < R; ++r)
        for (int v = 0; v < kVectors; ++v) store(out + r * kTile + v * kWidth, y[r][v]);
}

void multiply_rows(int rows, const Product& p, bool adds, float* out) {
    if (rows <= 4) return multiply<4>(p, adds, out);
    if (rows <= 8) return multiply<8>(p, adds, out);
    if (rows <= 12) return multiply<12>(p, adds, out);
    multiply<16>(p, adds, out);
}

// Tile `index` of matrix `at` (with its up tile, if gated) times blocks [begin, end) of x. Where it has more groups than a
// panel holds, outputs wait in memory for the next panel.
void run_tile(const Linear& a, int at, int64_t expert, int64_t index, const Activations& x, int64_t begin, int64_t end,
              Tiles& tiles) {
    alignas(64) int32_t ring[4][kSums];
    const int sides = a.gated ? 2 : 1;
    const int64_t size = a.matrices[at].group_size, most = kPanel / (size * kTile), panels = (x.groups + most - 1) / most;
    const int64_t waiting = panels > 1 ? end - begin : 1;
    char* const room = (char*)scratch(kPanelSlot, sides * kPanel);
    float* const outputs = (float*)scratch(kOutputSlot, waiting * sides * kSums * sizeof(float));
    for (int64_t i = 0; i < panels; ++i) {
        const int64_t first = x.groups * i / panels, count = x.groups * (i + 1) / panels - first;
        Panel panel[2];
        for (int s = 0; s < sides; ++s) {
            const Groups groups = groups_of(a.matrices[at + s], x.groups);
            const char* const from = tile_of(a.matrices[at + s], expert, index) + first * groups.bytes;
            panel[s] = panel_of(a.matrices[at + s], groups, from, count, room + s * kPanel);
        }
        for (int64_t b = begin; b < end; ++b) {
            const Block block = x.block(b);
            const char* const values = (const char*)block.words + first * size * x.lanes;
            float* const y = outputs + (panels > 1 ? b - begin : 0) * sides * kSums;
            for (int s = 0; s < sides; ++s) {
                const Panel& w = panel[s];
                const char* const asked = b == begin ? w.numbers + tile_bytes(a.matrices[at + s]) : nullptr;
                const Place place{values, w.lines, asked, w.numbers, block.scales + first * x.lanes};
                multiply_rows(block.rows, {tiles, w, place, x.lanes, size * x.lanes, x.sums - x.scales, ring}, i > 0,
                              y + s * kSums);
            }
            if (i + 1 == panels) finish_tile(a, at, index, block.first, block.rows, y, y + kSums);
        }
    }
}

}  // namespace

void tile_matmul(const Linear& a) {
    if (a.rows == 0) return;
    const Activations x = read_activations(a, Order::tiles, kMostTileRows);
    for_each_tile(a, x, [&](const auto& each) {
        Tiles tiles(x.lanes, piece_of(a.matrices[0].group_size));
        each([&](int at, int64_t expert, int64_t index, int64_t begin, int64_t end) {
            run_tile(a, at, expert, index, x, begin, end, tiles);
        });
    });
}

}  // namespace tiny_llm::TINY_ISA
