// A closed loop through HiFi-LoFi's FFTConvolver, one sample at a time: fftconvolver CHANNELS LENGTH RUNS.
// Prints one line of JSON for every head block size. Built by benches/compare.py --fftconvolver CHECKOUT.
#include <chrono>
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <memory>
#include <vector>

#include "TwoStageFFTConvolver.h"

int main(int argc, char** argv) {
    if (argc != 4) return std::fprintf(stderr, "usage: fftconvolver CHANNELS LENGTH RUNS\n"), 2;
    const int channels = std::atoi(argv[1]), length = std::atoi(argv[2]), runs = std::atoi(argv[3]);
    std::vector<std::vector<float>> filters(channels, std::vector<float>(length));
    for (int c = 0; c < channels; ++c) {
        std::srand(c + 1);
        double sum = 0;
        // Positive and summing to 1, so that the loop settles instead of reaching denormal numbers.
        for (int j = 0; j < length; ++j) sum += filters[c][j] = std::rand() * std::exp(-8.0f * j / length);
        for (float& value : filters[c]) value = static_cast<float>(value / sum);
    }
    for (int head : {8, 16, 32, 64, 128}) {
        const int tail = std::max(head, static_cast<int>(std::exp2(std::round(std::log2(std::sqrt(double(head) * length))))));
        double best = INFINITY;
        float last = 0;
        for (int run = 0; run < runs; ++run) {
            std::vector<std::unique_ptr<fftconvolver::TwoStageFFTConvolver>> convolvers;
            for (const auto& filter : filters) {
                convolvers.emplace_back(new fftconvolver::TwoStageFFTConvolver);
                convolvers.back()->init(head, tail, filter.data(), filter.size());
            }
            std::vector<float> values(channels, 1.0f);
            const auto start = std::chrono::steady_clock::now();
            for (int t = 0; t < length; ++t)
                for (int c = 0; c < channels; ++c) {
                    float output = 0;
                    convolvers[c]->process(&values[c], &output, 1);
                    values[c] = output;
                }
            const std::chrono::duration<double> seconds = std::chrono::steady_clock::now() - start;
            best = std::min(best, seconds.count());
            last = values[0];
        }
        std::printf("{\"head\": %d, \"ns_per_position_channel\": %.3f, \"last\": %e}\n", head,
                    best * 1e9 / channels / length, last);
        std::fflush(stdout);
    }
}
