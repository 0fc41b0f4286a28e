#include "attention.h"

#include <math.h>
#include <string.h>

#include "pool.h"
#include "product.h"
#include "simd.h"

namespace tiny_llm::TINY_ISA {
namespace {

constexpr int64_t kTile = 64;        // keys that are widened to float at once
constexpr int64_t kDirectRows = 16;  // with so few, keys and values are read where they lie
constexpr int kWorkSlot = 0, kPartialSlot = 1;

int64_t least(int64_t a, int64_t b) { return a < b ? a : b; }
int64_t round_up(int64_t n, int64_t unit) { return (n + unit - 1) / unit * unit; }

// A row's record: its sum of weighted values, the largest score, the sum of weights; then padding.
struct Records {
    float* base;
    int64_t padded;  // head dim, rounded up to whole vectors
    int64_t stride() const { return padded + kWidth; }
    float* at(int64_t i) const { return base + i * stride(); }
    float& most(int64_t i) const { return at(i)[padded]; }
    float& sum(int64_t i) const { return at(i)[padded + 1]; }
};

// The query rows of one item that read one key head, token by token, and the buffers for their work.
struct Rows {
    int64_t count, group;         // group: query heads of a token
    int64_t *limits;              // keys that a row sees; they never fall from row to row
    float *q, *scores, *tile;     // [count, D] scaled, [count, kSpan], one tile of keys or values
    Records total, part;
};

// ---- where a span's keys and values come from: `unit` of them at a time

template <class T>
struct Source {
    const Attend& a;
    const int32_t* table;
    int64_t head;
    const T* keys(int64_t block) const { return static_cast<const T*>(a.pool.keys) + offset(block); }
    const T* values(int64_t block) const { return static_cast<const T*>(a.pool.values) + offset(block); }
    int64_t offset(int64_t block) const {
        return (table[block] * a.pool.heads + head) * a.pool.dim * a.pool.block_size;
    }
};

// Block by block as they lie in the pool.
template <class T>
struct Direct : Source<T> {
    int64_t unit() const { return this->a.pool.block_size; }
    Right<T> keys_at(int64_t key, int64_t, const T* next) const { return {this->keys(key / unit()), unit(), next}; }
    Right<T> values_at(int64_t key, int64_t, const T* next) const {
        return {this->values(key / unit()), this->a.pool.dim, next};
    }
    const T* peek_keys(int64_t key) const { return this->keys(key / unit()); }
    const T* peek_values(int64_t key) const { return this->values(key / unit()); }
};

template <class T>
void widen(const T* from, int64_t rows, int64_t columns, float* to, int64_t stride) {
    const int64_t whole = columns / kWidth * kWidth;
    for (int64_t r = 0; r < rows; ++r, from += columns, to += stride) {
        for (int64_t c = 0; c < whole; c += kWidth) store(to + c, load(from + c));
        for (int64_t c = whole; c < columns; ++c) to[c] = to_float(from[c]);
    }
}

// Tile by tile, copied to float; values with zeros up to whole vectors.
template <class T>
struct Widened : Source<T> {
    float* tile;
    int64_t padded;
    int64_t unit() const { return kTile; }
    Right<float> keys_at(int64_t key, int64_t count, const float*) const {
        const int64_t size = this->a.pool.block_size, dim = this->a.pool.dim;
        for (int64_t i = 0; i < count; i += size)
            widen(this->keys((key + i) / size), dim, size, tile + i, kTile);
        return {tile, kTile, nullptr};
    }
    Right<float> values_at(int64_t key, int64_t count, const float*) const {
        const int64_t size = this->a.pool.block_size, dim = this->a.pool.dim;
        if (padded != dim) memset(tile, 0, kTile * padded * sizeof(float));
        for (int64_t i = 0; i < count; i += size)
            widen(this->values((key + i) / size), least(size, count - i), dim, tile + i * padded, padded);
        return {tile, padded, nullptr};
    }
    const float* peek_keys(int64_t) const { return nullptr; }
    const float* peek_values(int64_t) const { return nullptr; }
};

// ---- one span

// Calls body(first row, rows) over [from, count) in register blocks of nearly one size.
template <class Body>
void each_block(int64_t from, int64_t count, const Body& body) {
    const int64_t rows = count - from, blocks = (rows + kMostRows - 1) / kMostRows;
    for (int64_t i = 0, row = from; i < blocks; ++i) {
        const int64_t size = rows / blocks + (i < rows % blocks);
        body(row, size);
        row += size;
    }
}

int64_t seen(const Rows& rows, int64_t row, int64_t key, int64_t most) {
    const int64_t n = rows.limits[row] - key;
    return n < 0 ? 0 : least(n, most);
}

template <class From>
void score_span(const Rows& rows, int64_t from, int64_t first, int64_t dim, const From& source) {
    const int64_t keys = seen(rows, rows.count - 1, first, kSpan), unit = source.unit();
    for (int64_t at = 0; at < keys; at += unit) {
        const auto* next = at + unit < keys ? source.peek_keys(first + at + unit) : source.peek_values(first);
        const auto panel = source.keys_at(first + at, least(unit, keys - at), next);
        each_block(from, rows.count, [&](int64_t row, int64_t size) {
            const int64_t columns = round_up(seen(rows, row + size - 1, first + at, unit), kWidth);
            product<false>(size, {rows.q + row * dim, dim}, dim, panel,
                           rows.scores + row * kSpan + at, kSpan, columns);
        });
    }
}

// Scores to weights e^(score - largest), in place; returns the largest through `most`, their sum as result.
float soften(float* scores, int64_t count, float* most) {
    const int64_t whole = count / kWidth * kWidth;
    vi lane;
    for (int i = 0; i < kWidth; ++i) lane[i] = i;
    const vi inside = lane < splat_int((int32_t)(count - whole));
    vf largest = splat(-INFINITY), total = {};
    for (int64_t i = 0; i < whole; i += kWidth) largest = max(largest, load(scores + i));
    if (whole < count) largest = max(largest, select(inside, load(scores + whole), splat(-INFINITY)));
    *most = max_of(largest);
    const vf shift = splat(*most);
    for (int64_t i = 0; i < whole; i += kWidth) {
        const vf weight = exp(load(scores + i) - shift);
        store(scores + i, weight);
        total += weight;
    }
    if (whole < count) {
        const vf weight = select(inside, exp(load(scores + whole) - shift), vf{});
        store(scores + whole, weight);
        total += weight;
    }
    return sum(total);
}

// Each row adds the values that it sees and no others: what lies behind may be anything, a NaN too.
template <class From>
void weigh_span(const Rows& rows, int64_t from, int64_t first, const From& source, const Records& out) {
    const int64_t keys = seen(rows, rows.count - 1, first, kSpan), unit = source.unit();
    const auto* after = rows.limits[rows.count - 1] > first + kSpan ? source.peek_keys(first + kSpan) : nullptr;
    for (int64_t at = 0; at < keys; at += unit) {
        const auto* next = at + unit < keys ? source.peek_values(first + at + unit) : after;
        const auto panel = source.values_at(first + at, least(unit, keys - at), next);
        each_block(from, rows.count, [&](int64_t row, int64_t size) {
            const int64_t common = seen(rows, row, first + at, unit);
            product<true>(size, {rows.scores + row * kSpan + at, kSpan}, common, panel,
                          out.at(row), out.stride(), out.padded);
            for (int64_t r = row + 1; r < row + size; ++r) {
                const int64_t more = seen(rows, r, first + at, unit) - common;
                if (more > 0)
                    product<true>(1, {rows.scores + r * kSpan + at + common, kSpan}, more,
                                  panel.below(common), out.at(r), out.stride(), out.padded);
            }
        });
    }
}

template <class From>
void compute_span(const Rows& rows, int64_t from, int64_t span, int64_t dim, const From& source, const Records& out) {
    const int64_t first = span * kSpan;
    score_span(rows, from, first, dim, source);
    for (int64_t r = from; r < rows.count; ++r) {
        out.sum(r) = soften(rows.scores + r * kSpan, seen(rows, r, first, kSpan), &out.most(r));
        memset(out.at(r), 0, out.padded * sizeof(float));
    }
    weigh_span(rows, from, first, source, out);
}

// ---- spans to rows

void merge(const Records& total, int64_t i, const Records& part, int64_t j) {
    const float most = total.most(i) > part.most(j) ? total.most(i) : part.most(j);
    const vf old_factor = exp(splat(total.most(i) - most)), new_factor = exp(splat(part.most(j) - most));
    float *sums = total.at(i), *added = part.at(j);
    for (int64_t d = 0; d < total.padded; d += kWidth)
        store(sums + d, fma(load(sums + d), old_factor, load(added + d) * new_factor));
    total.sum(i) = total.sum(i) * old_factor[0] + part.sum(j) * new_factor[0];
    total.most(i) = most;
}

void write_row(const Records& total, int64_t i, float* out, int64_t dim) {
    const float factor = 1.0f / total.sum(i), *sums = total.at(i);
    const int64_t whole = dim / kWidth * kWidth;
    for (int64_t d = 0; d < whole; d += kWidth) store(out + d, load(sums + d) * splat(factor));
    for (int64_t d = whole; d < dim; ++d) out[d] = sums[d] * factor;
}

float* out_row(const Attend& a, const AttendItem& item, int64_t head, int64_t group, int64_t r) {
    const int64_t token = item.row + r / group, query_head = head * group + r % group;
    return a.out + (token * a.query_heads + query_head) * a.pool.dim;
}

// ---- one item

template <class T>
T* take(char*& at, int64_t count) {
    T* taken = reinterpret_cast<T*>(at);
    at += round_up(count * sizeof(T), 64);
    return taken;
}

Rows make_rows(const Attend& a, const AttendItem& item, int64_t head) {
    const int64_t dim = a.pool.dim, padded = round_up(dim, kWidth), group = a.query_heads / a.pool.heads;
    const int64_t count = item.rows * group, stride = Records{nullptr, padded}.stride();
    const int64_t words = count * (2 + dim + kSpan + 2 * stride) + kTile * padded;
    char* at = static_cast<char*>(scratch(kWorkSlot, words * sizeof(float) + 6 * 64));
    Rows rows{};
    rows.count = count, rows.group = group;
    rows.limits = take<int64_t>(at, count);
    rows.q = take<float>(at, count * dim);
    rows.scores = take<float>(at, count * kSpan);
    rows.tile = take<float>(at, kTile * padded);
    rows.total = {take<float>(at, count * stride), padded};
    rows.part = {take<float>(at, count * stride), padded};
    for (int64_t r = 0; r < count; ++r) {
        const float* q = a.q + ((item.row + r / group) * a.query_heads + head * group + r % group) * dim;
        for (int64_t d = 0; d < dim; ++d) rows.q[r * dim + d] = q[d] * a.scale;
        rows.limits[r] = item.position + r / group + 1;
    }
    return rows;
}

template <class From>
void sweep(const Attend& a, const AttendItem& item, int64_t head, const Rows& rows, const From& source) {
    for (int64_t span = item.first_span; span < item.first_span + item.spans; ++span) {
        int64_t from = 0;
        while (rows.limits[from] <= span * kSpan) ++from;
        const Records& to = span == item.first_span ? rows.total : rows.part;
        compute_span(rows, from, span, a.pool.dim, source, to);
        if (span > item.first_span)
            for (int64_t r = from; r < rows.count; ++r) merge(rows.total, r, rows.part, r);
    }
    if (item.partial >= 0) return;
    for (int64_t r = 0; r < rows.count; ++r)
        write_row(rows.total, r, out_row(a, item, head, rows.group, r), a.pool.dim);
}

template <class T>
void attend_item(const Attend& a, const AttendItem& item, int64_t head, float* partials) {
    Rows rows = make_rows(a, item, head);
    if (item.partial >= 0) rows.total.base = Records{partials, rows.total.padded}.at(item.partial + head * rows.count);
    const Source<T> source{a, a.tables + item.sequence * a.table_width, head};
    if (rows.count <= kDirectRows && a.pool.dim % kWidth == 0) {
        sweep(a, item, head, rows, Direct<T>{source});
    } else {
        sweep(a, item, head, rows, Widened<T>{source, rows.tile, rows.total.padded});
    }
}

void refuse(const Attend& a, const AttendItem& item, int64_t head) {
    const int64_t group = a.query_heads / a.pool.heads;
    for (int64_t r = 0; r < item.rows * group; ++r)
        for (int64_t d = 0; d < a.pool.dim; ++d) out_row(a, item, head, group, r)[d] = NAN;
}

// One row's spans, in their order.
void merge_row(const Attend& a, const AttendMerge& m, int64_t index, const Records& records) {
    const int64_t group = a.query_heads / a.pool.heads, count = m.rows * group;
    const int64_t head = index / count, r = index % count;
    const int64_t first = m.partial + index, spans = (m.position + r / group) / kSpan + 1;
    for (int64_t span = 1; span < spans; ++span)
        merge(records, first, records, first + span * m.rows * a.query_heads);
    AttendItem item{};
    item.row = m.row;
    write_row(records, first, out_row(a, item, head, group, r), a.pool.dim);
}

// Work that is too small to be shared out stays on one thread.
int64_t grain_of(const Attend& a) {
    int64_t keys = 0;
    for (int64_t i = 0; i < a.item_count; ++i)
        keys += a.items[i].rows * least(a.items[i].spans * kSpan, a.items[i].position + a.items[i].rows);
    const int64_t average = keys * (a.query_heads / a.pool.heads) * 2 * a.pool.dim / a.item_count;
    return 1 + 65536 / (average + 1);
}

template <class T>
void attend_all(const Attend& a) {
    const int64_t padded = round_up(a.pool.dim, kWidth);
    Records records{nullptr, padded};
    records.base = static_cast<float*>(scratch(kPartialSlot, a.records * records.stride() * sizeof(float)));
    parallel_for(a.item_count * a.pool.heads, grain_of(a), [&](int64_t begin, int64_t end) {
        for (int64_t i = begin; i < end; ++i) {
            const AttendItem& item = a.items[i % a.item_count];
            if (item.spans == 0) {
                refuse(a, item, i / a.item_count);
            } else {
                attend_item<T>(a, item, i / a.item_count, records.base);
            }
        }
    });
    for (int64_t i = 0; i < a.merge_count; ++i)
        parallel_for(a.merges[i].rows * a.query_heads, 1 + 256 / a.merges[i].spans, [&](int64_t begin, int64_t end) {
            for (int64_t row = begin; row < end; ++row) merge_row(a, a.merges[i], row, records);
        });
}

}  // namespace

void attend(const Attend& a) {
    if (a.item_count == 0) return;
    if (a.pool.type == KvType::f32) return attend_all<float>(a);
    if (a.pool.type == KvType::bf16) return attend_all<bf16>(a);
    attend_all<f16>(a);
}

}  // namespace tiny_llm::TINY_ISA
