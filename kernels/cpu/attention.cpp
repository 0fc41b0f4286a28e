#include "attention.h"

#include <math.h>
#include <string.h>

#include "panels.h"
#include "pool.h"
#include "product.h"
#include "simd.h"

namespace tiny_llm::TINY_ISA {
namespace {

constexpr int64_t kDirectRows = 16;  // with so few, keys and values are read where they lie
constexpr float kLog2e = 1.44269504f;  // scores are logarithms to base 2
constexpr int kWorkSlot = 0, kPartialSlot = 1;

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
    int64_t count, group;     // group: query heads of a token
    int64_t *firsts, *limits;  // a row sees keys [first, limit); they never fall from row to row
    float *q, *scores;        // [count, D] times scale and log2 e; [rows at once, kSpan]; or by pairs
    float *keys, *values;     // a span's, copied to float
    float *key_scales, *value_scales;  // a span's, or null: keys and values are what they are
    Records total, part;
};

int64_t seen(const Rows& rows, int64_t row, int64_t key, int64_t most) {
    const int64_t n = rows.limits[row] - key;
    return n < 0 ? 0 : least(n, most);
}

// Of these, from the span's beginning on, the ones that lie before a row's window.
int64_t hidden(const Rows& rows, int64_t row, int64_t key) {
    const int64_t n = rows.firsts[row] - key;
    return n < 0 ? 0 : least(n, kSpan);
}

// ---- where a span's keys and values come from

// begin 3.2 block_part
// Where in a pool's keys, and in its values, key head `head`'s part of block number `block` of a sequence begins.
int64_t block_part(const KvPool& pool, const int32_t* table, int64_t block, int64_t head) {
    return (table[block] * pool.heads + head) * pool.dim * pool.block_size;
}
// end 3.2

template <class T>
struct Source {
    const Attend& a;
    const int32_t* table;
    int64_t head, keys_begin, keys_end, keys_limit;  // of the item's first row, of its last, and of that in later items
    int64_t size() const { return a.pool.block_size; }
    const T* keys(int64_t block) const { return static_cast<const T*>(a.pool.keys) + offset(block); }
    const T* values(int64_t block) const { return static_cast<const T*>(a.pool.values) + offset(block); }
    int64_t offset(int64_t block) const { return block_part(a.pool, table, block, head); }
    // What the integers of a span are multiples of.
    void widen_scales(const void* scales, int64_t first, float* to) const {
        const int64_t keys = least(kSpan, keys_end - first);
        for (int64_t key = hidden_of(first); key < keys; key += kWidth) {
            const int64_t at = first + key, row = table[at / size()] * a.pool.heads + head;
            store(to + key, load(static_cast<const f16*>(scales) + row * size() + at % size()));
        }
    }
    // Keys of the span's first blocks, of which no row sees any.
    int64_t hidden_of(int64_t first) const { return keys_begin > first ? (keys_begin - first) / size() * size() : 0; }
    int64_t blocks_of(int64_t first) const {
        return (least(kSpan, keys_end - first) + size() - 1) / size();
    }
};

// Block by block as they lie in the pool. A span's values are brought near while its keys are read, and
// the next span's keys while the values are, though it be the next item's.
template <class T>
struct Direct : Source<T> {
    static constexpr int64_t kRowsAtOnce = kDirectRows, kRowsInRegisters = most_rows<T>;
    mutable const T *key_blocks[kSpan / 16], *value_blocks[kSpan / 16], *ahead[kSpan / 16];
    void enter(int64_t first) const {
        const int64_t blocks = this->blocks_of(first), block = first / this->size(), next = kSpan / this->size();
        for (int64_t i = 0; i < blocks; ++i) {
            key_blocks[i] = this->keys(block + i), value_blocks[i] = this->values(block + i);
            ahead[i] = (block + i + next) * this->size() < this->keys_limit ? this->keys(block + i + next) : value_blocks[i];
        }
    }
    int64_t key_unit() const { return this->size(); }
    Right<T> keys_at(int64_t i) const { return {key_blocks + i, this->a.pool.dim, this->size(), value_blocks + i}; }
    int64_t value_unit() const { return this->a.pool.dim; }
    Right<T> values_at(int64_t) const { return {value_blocks, this->size(), this->a.pool.dim, ahead}; }
};

// begin 3.2 gather_span
// The blocks of the span that starts at key `first`, of which some row sees some key, to panels of floats.
template <class T>
void gather_span(const Source<T>& source, int64_t first, float* key_panels, float* value_panels) {
    const int64_t dim = source.a.pool.dim, size = source.size(), keys = least(kSpan, source.keys_end - first);
    for (int64_t key = source.hidden_of(first); key < keys; key += size) {
        pack(source.keys((first + key) / size), dim, size, key_panels, dim, 0, key);
        pack(source.values((first + key) / size), least(size, keys - key), dim, value_panels, kSpan, key, 0);
    }
}
// end 3.2

// Copied to panels: [keys / kPanel, D, kPanel] and [D / kPanel, kSpan, kPanel].
template <class T>
struct Packed : Source<T> {
    static constexpr int64_t kRowsInRegisters = most_rows<float>, kRowsAtOnce = 2 * kRowsInRegisters;
    float *key_panels, *value_panels;
    mutable const float* at[2];  // a panel, and the next
    void enter(int64_t first) const { gather_span(*this, first, key_panels, value_panels); }
    int64_t key_unit() const { return kPanel; }
    Right<float> keys_at(int64_t i) const {
        at[0] = key_panels + i * panel(this->a.pool.dim), at[1] = at[0] + panel(this->a.pool.dim);
        return {at, this->a.pool.dim, kPanel / kTogether, at + 1};
    }
    int64_t value_unit() const { return kPanel; }
    Right<float> values_at(int64_t i) const {
        // The last one's next is the first of the keys: to bring near what nobody has touched takes long.
        const bool last = (i + 1) * kPanel >= this->a.pool.dim;
        at[0] = value_panels + i * panel(kSpan), at[1] = last ? key_panels : at[0] + panel(kSpan);
        return {at, kSpan, kPanel / kTogether, at + 1};
    }
};

// ---- one span

// Calls body(first row, rows) over [from, to) in pieces of at most `most` rows and nearly one size.
template <class Body>
void in_pieces(int64_t from, int64_t to, int64_t most, const Body& body) {
    const int64_t rows = to - from, pieces = (rows + most - 1) / most;
    for (int64_t i = 0, row = from; i < pieces; ++i) {
        const int64_t size = rows / pieces + (i < rows % pieces);
        body(row, size);
        row += size;
    }
}

template <class From>
void score_span(const Rows& rows, int64_t from, int64_t to, int64_t first, int64_t dim, const From& source) {
    const int64_t keys = seen(rows, to - 1, first, kSpan), unit = source.key_unit();
    for (int64_t at = hidden(rows, from, first) / unit * unit; at < keys; at += unit) {
        const auto panel = source.keys_at(at / unit);
        in_pieces(from, to, From::kRowsInRegisters, [&](int64_t row, int64_t size) {
            const int64_t columns = round_up(seen(rows, row + size - 1, first + at, unit), kWidth);
            product<false>(size, {rows.q + row * dim, dim}, 0, dim, panel,
                           rows.scores + (row - from) * kSpan + at, kSpan, columns);
        });
    }
}

constexpr int kSoftened = 4;  // vectors: what one waits for, another computes

// The largest score, after each was multiplied by its key's scale if there are scales; -infinity before `begin`,
// and from `count` up to `padded`.
float largest_score(float* scores, int64_t begin, int64_t count, int64_t padded, const float* scales) {
    const int64_t edge = round_up(begin, kWidth), last = count / kWidth * kWidth;
    const int64_t whole = scales && last > edge ? last : edge;
    vf largest = splat(-INFINITY);
    for (int64_t i = edge; i < whole; i += kWidth) {
        const vf scaled = load(scores + i) * load(scales + i);
        store(scores + i, scaled);
        largest = max(largest, scaled);
    }
    if (scales) {
        for (int64_t i = begin; i < least(edge, count); ++i) scores[i] *= scales[i];
        for (int64_t i = whole; i < count; ++i) scores[i] *= scales[i];
    }
    for (int64_t i = 0; i < begin; ++i) scores[i] = -INFINITY;
    for (int64_t i = count; i < padded; ++i) scores[i] = -INFINITY;
    for (int64_t i = 0; i < edge; i += kWidth) largest = max(largest, load(scores + i));
    for (int64_t i = whole; i < padded; i += kWidth) largest = max(largest, load(scores + i));
    return max_of(largest);
}

// begin 2.5 soften
// Scores to weights 2^(score - most), in place; their sum is returned. `most` becomes the largest score,
// rounded up, so that what spans are merged by are powers of two. Weights are then times their values' scales.
float soften(float* scores, int64_t begin, int64_t count, const float* key_scales, const float* value_scales,
             float* most) {
    const int64_t step = kSoftened * kWidth, padded = round_up(count, step);
    const float highest = ceilf(largest_score(scores, begin, count, padded, key_scales));
    vf total = {};
    for (int64_t i = 0; i < padded; i += step) {
        vf weights[kSoftened];
        for (int v = 0; v < kSoftened; ++v) weights[v] = load(scores + i + v * kWidth);
        exp2_below(weights, highest);
        for (int v = 0; v < kSoftened; ++v) total += weights[v];
        if (value_scales)
            for (int v = 0; v < kSoftened; ++v) weights[v] *= load(value_scales + i + v * kWidth);
        for (int v = 0; v < kSoftened; ++v) store(scores + i + v * kWidth, weights[v]);
    }
    *most = highest;
    return sum(total);
}
// end 2.5

// begin 2.5 weigh_rows
// The weighted sums of a span's values for rows [row, row + size): some columns of them, which `panel` holds. Each row
// adds what it sees, in order, and nothing else: what lies around it may be anything, a NaN too. The rows add together
// what all of them see, and each alone what it sees before and behind that.
//   weights: the first row's, kSpan a row; sums: the first row's, `stride` a row, written over
template <class T>
void weigh_rows(const Rows& rows, int64_t row, int64_t size, int64_t first, const float* weights, const Right<T>& panel,
                float* sums, int64_t stride, int64_t columns) {
    const int64_t begin = hidden(rows, row + size - 1, first), end = seen(rows, row, first, kSpan);
    if (begin == hidden(rows, row, first)) {
        product<false>(size, {weights, kSpan}, begin, end, panel, sums, stride, columns);
    } else {
        for (int64_t r = 0; r < size; ++r)
            product<false>(1, {weights + r * kSpan, kSpan}, hidden(rows, row + r, first),
                           least(begin, seen(rows, row + r, first, kSpan)), panel, sums + r * stride, stride, columns);
        if (begin < end) product<true>(size, {weights, kSpan}, begin, end, panel, sums, stride, columns);
    }
    const int64_t behind = end > begin ? end : begin;
    for (int64_t r = 0; r < size; ++r) {
        const int64_t more = seen(rows, row + r, first, kSpan);
        if (more > behind)
            product<true>(1, {weights + r * kSpan, kSpan}, behind, more, panel, sums + r * stride, stride, columns);
    }
}
// end 2.5

template <class From>
void weigh_span(const Rows& rows, int64_t from, int64_t to, int64_t first, const From& source, const Records& out) {
    const int64_t unit = source.value_unit();
    for (int64_t at = 0; at < out.padded; at += unit) {
        const auto panel = source.values_at(at / unit);
        const int64_t columns = least(round_up(unit, kWidth), out.padded - at);
        in_pieces(from, to, From::kRowsInRegisters, [&](int64_t row, int64_t size) {
            weigh_rows(rows, row, size, first, rows.scores + (row - from) * kSpan, panel, out.at(row - from) + at,
                       out.stride(), columns);
        });
    }
}

// Rows [from, to): their records are written to `out` from its first on.
template <class From>
void compute_span(const Rows& rows, int64_t from, int64_t to, int64_t first, int64_t dim, const From& source,
                  const Records& out) {
    score_span(rows, from, to, first, dim, source);
    for (int64_t r = from; r < to; ++r) {
        float* scores = rows.scores + (r - from) * kSpan;
        const int64_t keys = seen(rows, r, first, kSpan);
        out.sum(r - from) = soften(scores, hidden(rows, r, first), keys, rows.key_scales, rows.value_scales, &out.most(r - from));
        // Weights that are rounded are so in their sum too: else one key that is all that matters would be a little less.
        if (kTogether > 1) out.sum(r - from) = write_left(scores, round_up(keys, 2 * kWidth), 1.0f, scores);
    }
    weigh_span(rows, from, to, first, source, out);
}

// ---- spans to rows

// begin 2.5 merge
// Record j of `part` joins record i of `total`, both to the base of the larger `most`.
void merge(const Records& total, int64_t i, const Records& part, int64_t j) {
    const float most = total.most(i) > part.most(j) ? total.most(i) : part.most(j);
    vf factors[] = {splat(total.most(i)), splat(part.most(j))};
    exp2_below(factors, most);
    const vf old_factor = factors[0], new_factor = factors[1];
    float *sums = total.at(i), *added = part.at(j);
    for (int64_t d = 0; d < total.padded; d += kWidth)
        store(sums + d, fma(load(sums + d), old_factor, load(added + d) * new_factor));
    total.sum(i) = total.sum(i) * old_factor[0] + part.sum(j) * new_factor[0];
    total.most(i) = most;
}
// end 2.5

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

// The record of query row r of an item, of a span that the row's sequence shares with others.
int64_t prior_record(const AttendPrior& prior, int64_t head, int64_t group, int64_t r) {
    return prior.partial + (head * prior.rows + prior.at) * group + r;
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
    const int64_t most = least(count, kDirectRows), span = kSpan * round_up(dim, kPanel);
    const int64_t words = count * (4 + dim + stride) + most * (kSpan + stride) + 2 * (span + kSpan);
    char* at = static_cast<char*>(scratch(kWorkSlot, words * sizeof(float) + 10 * 64));
    Rows rows{};
    rows.count = count, rows.group = group;
    rows.firsts = take<int64_t>(at, count);
    rows.limits = take<int64_t>(at, count);
    rows.q = take<float>(at, count * dim);
    rows.scores = take<float>(at, most * kSpan);
    rows.keys = take<float>(at, span);
    rows.values = take<float>(at, span);
    if (a.pool.key_scales) rows.key_scales = take<float>(at, kSpan), rows.value_scales = take<float>(at, kSpan);
    rows.total = {take<float>(at, count * stride), padded};
    rows.part = {take<float>(at, most * stride), padded};
    const float scale = a.scale * kLog2e;
    for (int64_t r = 0; r < count; ++r) {
        const bool shared = item.shared >= 0;
        const int64_t token = shared ? a.shared_rows[item.shared + r / group] : item.row + r / group;
        const float* q = a.q + (token * a.query_heads + head * group + r % group) * dim;
        write_left(q, dim, scale, rows.q + r * dim);
        rows.limits[r] = item.position + 1 + (shared ? 0 : r / group);
        rows.firsts[r] = shared || rows.limits[r] < a.window ? 0 : rows.limits[r] - a.window;
    }
    return rows;
}

// Begin the rows' sums with those of the spans before the item's first, which sequences have shared.
void begin_with(const AttendPrior* priors, int64_t spans, int64_t head, const Rows& rows, const Records& records) {
    for (int64_t r = 0; r < rows.count; ++r) {
        const float* first = records.at(prior_record(priors[0], head, rows.group, r));
        memcpy(rows.total.at(r), first, records.stride() * sizeof(float));
        for (int64_t span = 1; span < spans; ++span)
            merge(rows.total, r, records, prior_record(priors[span], head, rows.group, r));
    }
}

// begin 2.5 add_rows
// What rows [row, row + count) see of the span that starts at key `first`, into their records in rows.total, which
// begin with this span if begins(row) says so; if it does so of a row, then of those behind it too.
template <class From, class Begins>
void add_rows(const Rows& rows, int64_t row, int64_t count, int64_t first, int64_t dim, const From& source,
              const Begins& begins) {
    if (begins(row)) return compute_span(rows, row, row + count, first, dim, source, {rows.total.at(row), rows.total.padded});
    compute_span(rows, row, row + count, first, dim, source, rows.part);
    for (int64_t r = 0; r < count; ++r) {
        if (begins(row + r)) {
            memcpy(rows.total.at(row + r), rows.part.at(r), rows.part.stride() * sizeof(float));
        } else {
            merge(rows.total, row + r, rows.part, r);
        }
    }
}
// end 2.5

template <class From>
void sweep(const Attend& a, const AttendItem& item, int64_t head, const Rows& rows, const From& source,
           const Records& records) {
    static_assert(From::kRowsAtOnce <= kDirectRows);
    const bool goes_on = item.prior >= 0 && item.partial < 0;
    if (goes_on) begin_with(a.priors + item.prior, item.first_span, head, rows, records);
    for (int64_t span = item.first_span; span < item.first_span + item.spans; ++span) {
        const int64_t first = span * kSpan;
        int64_t from = 0, to = rows.count;  // who sees something of it
        while (rows.limits[from] <= first) ++from;
        while (rows.firsts[to - 1] >= first + kSpan) --to;
        source.enter(first);
        if (rows.key_scales) {
            source.widen_scales(a.pool.key_scales, first, rows.key_scales);
            source.widen_scales(a.pool.value_scales, first, rows.value_scales);
        }
        // Whether the row's sum begins here: with its window, or with the item.
        const auto begins = [&](int64_t row) {
            return !goes_on && (span == item.first_span || rows.firsts[row] >= first);
        };
        in_pieces(from, to, From::kRowsAtOnce, [&](int64_t row, int64_t count) {
            add_rows(rows, row, count, first, a.pool.dim, source, begins);
        });
    }
    if (item.partial >= 0) return;
    for (int64_t r = 0; r < rows.count; ++r)
        write_row(rows.total, r, out_row(a, item, head, rows.group, r), a.pool.dim);
}

template <class T>
void attend_item(const Attend& a, const AttendItem& item, int64_t head, const Records& records) {
    Rows rows = make_rows(a, item, head);
    if (item.partial >= 0) rows.total.base = records.at(item.partial + head * rows.count);
    const int64_t end = least(rows.limits[rows.count - 1], (item.first_span + item.spans) * kSpan);
    const Source<T> source{a, a.tables + item.sequence * a.table_width, head, rows.firsts[0], end, rows.limits[rows.count - 1]};
    if (rows.count <= kDirectRows && a.pool.dim % kWidth == 0) {
        sweep(a, item, head, rows, Direct<T>{source, {}, {}, {}}, records);
    } else {
        sweep(a, item, head, rows, Packed<T>{source, rows.keys, rows.values, {}}, records);
    }
}

void refuse(const Attend& a, const AttendItem& item, int64_t head) {
    const int64_t group = a.query_heads / a.pool.heads;
    for (int64_t r = 0; r < item.rows * group; ++r)
        for (int64_t d = 0; d < a.pool.dim; ++d) out_row(a, item, head, group, r)[d] = NAN;
}

// One row's spans, in their order: those that it shares, then those of its own.
void merge_row(const Attend& a, const AttendMerge& m, int64_t index, const Records& records) {
    const int64_t group = a.query_heads / a.pool.heads, count = m.rows * group;
    const int64_t head = index / count, r = index % count;
    const auto record = [&](int64_t span) {
        if (span < m.first_span) return prior_record(a.priors[m.prior + span], head, group, r);
        return m.partial + index + (span - m.first_span) * m.rows * a.query_heads;
    };
    const int64_t seen = m.position + r / group + 1, spans = (seen - 1) / kSpan + 1;
    const int64_t first = seen > a.window ? (seen - a.window) / kSpan : 0;
    for (int64_t span = first + 1; span < spans; ++span) merge(records, record(first), records, record(span));
    AttendItem item{};
    item.row = m.row;
    write_row(records, record(first), out_row(a, item, head, group, r), a.pool.dim);
}

// Work that is too small to be shared out stays on one thread.
int64_t grain_of(const Attend& a, const AttendItem* items, int64_t count) {
    int64_t keys = 0;
    for (int64_t i = 0; i < count; ++i)
        keys += items[i].rows * least(items[i].spans * kSpan, items[i].position + items[i].rows);
    const int64_t average = keys * (a.query_heads / a.pool.heads) * 2 * a.pool.dim / count;
    return 1 + 65536 / (average + 1);
}

template <class T>
void attend_items(const Attend& a, const AttendItem* items, int64_t count, const Records& records) {
    if (count == 0) return;
    const int64_t heads = a.pool.heads;  // one after the other, as a block holds them
    parallel_for(count * heads, grain_of(a, items, count), [&](int64_t begin, int64_t end) {
        for (int64_t i = begin; i < end; ++i) {
            const AttendItem& item = items[i / heads];
            if (item.spans == 0) {
                refuse(a, item, i % heads);
            } else {
                attend_item<T>(a, item, i % heads, records);
            }
        }
    });
}

template <class T>
void attend_all(const Attend& a) {
    const int64_t padded = round_up(a.pool.dim, kWidth);
    Records records{nullptr, padded};
    records.base = static_cast<float*>(scratch(kPartialSlot, a.records * records.stride() * sizeof(float)));
    attend_items<T>(a, a.items, a.shared_count, records);
    attend_items<T>(a, a.items + a.shared_count, a.item_count - a.shared_count, records);
    for (int64_t i = 0; i < a.merge_count; ++i) {
        const AttendMerge& m = a.merges[i];
        parallel_for(m.rows * a.query_heads, 1 + 256 / (m.first_span + m.spans), [&](int64_t begin, int64_t end) {
            for (int64_t row = begin; row < end; ++row) merge_row(a, m, row, records);
        });
    }
}

}  // namespace

void attend(const Attend& a) {
    if (a.item_count == 0) return;
#if defined(__AVX512BF16__)
    attend_all<bf16>(a);
#else
    if (a.pool.type == KvType::f32) return attend_all<float>(a);
#if !defined(TINY_ALONE)  // the course's library has floats
#if defined(__AVX512VNNI__)
    if (a.pool.type == KvType::bf16 && isa() == Isa::avx512bf16) return avx512bf16::attend(a);
#endif
    if (a.pool.type == KvType::bf16) return attend_all<bf16>(a);
    if (a.pool.type == KvType::i8) return attend_all<int8_t>(a);
    attend_all<f16>(a);
#endif
#endif
}

}  // namespace tiny_llm::TINY_ISA
