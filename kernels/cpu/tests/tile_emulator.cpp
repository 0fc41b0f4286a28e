#include "tile_emulator.h"

#include <atomic>
#include <csignal>
#include <cstdio>
#include <cstdlib>
#include <cstring>

#include "../isa.h"

#if defined(TINY_X86_SETS) && defined(__linux__)
#include <ucontext.h>

namespace tiny_llm::test {
namespace {

enum Kind { kConfigured, kReleased, kCleared, kLoaded, kStored, kMultiplied, kKinds };
std::atomic<int64_t> met[kKinds];

// What LDTILECFG reads.
struct Config {
    uint8_t palette, start_row, reserved[14];
    uint16_t row_bytes[16];
    uint8_t rows[16];
};

struct Tiles {
    Config config;
    uint8_t at[8][16][64];
};
thread_local Tiles tiles;

void insist(bool ok, const char* what) {
    if (ok) return;
    std::fprintf(stderr, "tile instruction: %s\n", what);
    std::abort();
}

// One instruction: VEX with three bytes, an opcode, ModRM and what follows it.
class Instruction {
public:
    Instruction(ucontext_t* context, const uint8_t* code) : registers_(context->uc_mcontext.gregs), code_(code) {
        insist(code[0] == 0xc4 && (code[1] & 0x1f) == 2, "not one of AMX");
        mod_ = code[4] >> 6, reg = (code[4] >> 3 & 7) | high(7), rm = (code[4] & 7) | high(5);
        opcode = code[3], prefix = code[2] & 3, other = ~code[2] >> 3 & 15;
        if (mod_ != 3) read_address();
    }

    int opcode, prefix, reg, rm, other;  // prefix: none, 66, F3, F2
    int length = 5;
    char* base = nullptr;  // of memory, if there is any
    int64_t stride = 0;    // the index, scaled

private:
    int high(int bit) const { return (~code_[1] >> bit & 1) << 3; }
    int64_t general(int number) const {
        static constexpr int kNames[] = {REG_RAX, REG_RCX, REG_RDX, REG_RBX, REG_RSP, REG_RBP, REG_RSI, REG_RDI,
                                         REG_R8,  REG_R9,  REG_R10, REG_R11, REG_R12, REG_R13, REG_R14, REG_R15};
        return registers_[kNames[number]];
    }
    void read_address() {
        int from = rm;
        bool based = true;
        if ((rm & 7) == 4) {
            const uint8_t sib = code_[length++];
            const int index = (sib >> 3 & 7) | high(6);
            from = (sib & 7) | high(5);
            based = mod_ != 0 || (sib & 7) != 5;
            if (index != 4) stride = general(index) << (sib >> 6);
        } else {
            insist(mod_ != 0 || (rm & 7) != 5, "memory beside the code");
        }
        int32_t far = 0;
        if (mod_ == 1) far = static_cast<int8_t>(code_[length++]);
        if (mod_ == 2 || !based) std::memcpy(&far, code_ + length, 4), length += 4;
        base = reinterpret_cast<char*>((based ? general(from) : 0) + far);
    }

    const greg_t* registers_;
    const uint8_t* code_;
    int mod_;
};

int rows_of(int tile) {
    insist(tile < 8 && tiles.config.palette == 1 && tiles.config.rows[tile] > 0, "of a tile without a shape");
    return tiles.config.rows[tile];
}

void configure(const Instruction& i) {
    std::memcpy(&tiles.config, i.base, sizeof(Config));
    insist(tiles.config.palette == 1 && !tiles.config.start_row, "a palette that there is not");
    for (int t = 0; t < 16; ++t) {
        const int rows = tiles.config.rows[t], bytes = tiles.config.row_bytes[t];
        insist(rows <= 16 && bytes <= 64 && !rows == !bytes && (t < 8 || !rows), "a shape that no tile can have");
    }
    std::memset(tiles.at, 0, sizeof tiles.at);
    ++met[kConfigured];
}

void move(const Instruction& i, bool loads) {
    const int rows = rows_of(i.reg), bytes = tiles.config.row_bytes[i.reg];
    if (loads) std::memset(tiles.at[i.reg], 0, sizeof tiles.at[0]);
    for (int r = 0; r < rows; ++r)
        loads ? std::memcpy(tiles.at[i.reg][r], i.base + r * i.stride, bytes)
              : std::memcpy(i.base + r * i.stride, tiles.at[i.reg][r], bytes);
    ++met[loads ? kLoaded : kStored];
}

// c += a (signed) times b (not signed): TDPBSUD.
void multiply(int c, int a, int b) {
    const int rows = rows_of(c), words = rows_of(b), bytes = tiles.config.row_bytes[c];
    insist(rows == rows_of(a) && bytes == tiles.config.row_bytes[b] && tiles.config.row_bytes[a] == 4 * words,
           "shapes that do not fit");
    insist(c != a && c != b && a != b, "a tile times itself");
    for (int r = 0; r < rows; ++r)
        for (int o = 0; o < bytes / 4; ++o) {
            int32_t sum;
            std::memcpy(&sum, &tiles.at[c][r][4 * o], 4);
            for (int k = 0; k < 4 * words; ++k)
                sum += static_cast<int8_t>(tiles.at[a][r][k]) * tiles.at[b][k / 4][4 * o + k % 4];
            std::memcpy(&tiles.at[c][r][4 * o], &sum, 4);
        }
    ++met[kMultiplied];
}

void run(const Instruction& i) {
    if (i.opcode == 0x49 && i.base && i.prefix == 0) return configure(i);
    if (i.opcode == 0x4b && i.base && i.prefix >= 2) return move(i, i.prefix == 3);
    if (i.opcode == 0x5e && i.prefix == 2) return multiply(i.reg, i.rm, i.other);
    insist(i.opcode == 0x49 && !i.base && (i.prefix == 0 || i.prefix == 3), "one that no kernel here has");
    if (i.prefix == 3) std::memset(tiles.at[i.reg], 0, rows_of(i.reg) * 64), ++met[kCleared];
    if (i.prefix == 0) std::memset(&tiles.config, 0, sizeof(Config)), ++met[kReleased];
}

void on_illegal(int, siginfo_t* info, void* context) {
    auto* const state = static_cast<ucontext_t*>(context);
    const Instruction instruction(state, static_cast<const uint8_t*>(info->si_addr));
    run(instruction);
    state->uc_mcontext.gregs[REG_RIP] += instruction.length;
}

}  // namespace

bool can_emulate_tiles() { return best_isa() >= Isa::avx512; }

TileCounts with_tiles_emulated(void (*body)()) {
    struct sigaction emulate = {}, before;
    emulate.sa_sigaction = on_illegal;
    emulate.sa_flags = SA_SIGINFO;
    sigaction(SIGILL, &emulate, &before);
    for (auto& count : met) count = 0;
    body();
    sigaction(SIGILL, &before, nullptr);
    return {met[0], met[1], met[2], met[3], met[4], met[5]};
}

}  // namespace tiny_llm::test

#else

namespace tiny_llm::test {

bool can_emulate_tiles() { return false; }
TileCounts with_tiles_emulated(void (*)()) { return {}; }

}  // namespace tiny_llm::test

#endif
