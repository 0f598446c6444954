// Stretches that end in 200 random orders, from one thread and from four, are merged to the same bits as in order.
// Prints what went wrong and returns 1, or nothing and 0.
#include <cstdio>
#include <cstring>
#include <numeric>
#include <random>
#include <thread>

#include "stretches.h"

using namespace flow_kernels;

constexpr int64_t num_rows = 50, num_tiles = 64, tile = 10;

std::vector<RowTotals> merged(const HeadProblem& problem, const std::vector<std::vector<RowStats>>& parts,
                              const std::vector<int64_t>& order, int num_threads) {
  Stretches stretches(problem, num_tiles);
  const auto add = [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
      Stretches::Stats stats = stretches.room();
      std::memcpy(stats.get(), parts[order[i]].data(), num_rows * sizeof(RowStats));
      stretches.add(order[i], std::move(stats));
    }
  };
  std::vector<std::thread> threads;
  for (int t = 0; t < num_threads; ++t) threads.emplace_back(add, t * num_tiles / num_threads, (t + 1) * num_tiles / num_threads);
  for (std::thread& thread : threads) thread.join();
  std::vector<RowTotals> totals;
  for (int64_t row = 0; row < num_rows; ++row) totals.push_back(stretches.total(row));
  return totals;
}

int main() {
  std::mt19937 random(1);
  std::normal_distribution<float> normal(0, 5);
  std::uniform_real_distribution<float> uniform(0, 100);
  std::vector<int64_t> target(num_rows);
  std::vector<float> target_logit(num_rows), max_before(num_rows, -INFINITY);
  for (int64_t& t : target) t = random() % (num_tiles * tile);
  HeadProblem problem{};
  problem.num_rows = num_rows;
  problem.num_tiles = num_tiles;
  problem.tile = tile;
  problem.rows.target = target.data();
  problem.rows.target_logit = target_logit.data();
  problem.rows.max_before = max_before.data();
  std::vector<std::vector<RowStats>> parts(num_tiles, std::vector<RowStats>(num_rows));
  for (auto& part : parts) {
    for (RowStats& s : part) s = {normal(random), uniform(random), normal(random), -uniform(random)};
  }
  std::vector<int64_t> order(num_tiles);
  std::iota(order.begin(), order.end(), 0);
  const std::vector<RowTotals> wanted = merged(problem, parts, order, 1);
  // Against the sums themselves, from the definition.
  for (int64_t row = 0; row < num_rows; ++row) {
    double max = -INFINITY, before = -INFINITY, sum = 0, product = 0;
    for (const auto& part : parts) max = std::max<double>(max, part[row].max);
    for (int64_t s = 0; s < num_tiles; ++s) {
      const RowStats& part = parts[s][row];
      if ((s + 1) * tile <= target[row]) before = std::max<double>(before, part.max);
      const double factor = std::exp(part.max - max);
      sum += part.sum * factor;
      product += factor * (part.product + part.sum * (part.max - max));
    }
    const RowTotals& found = wanted[row];
    const bool close = std::abs(found.sum - sum) < 1e-12 * sum && std::abs(found.product - product) < 1e-12 * std::abs(product);
    if (found.max != max || found.max_before != before || !close) {
      std::printf("row %d is not the sum of its stretches\n", static_cast<int>(row));
      return 1;
    }
  }
  for (int trial = 0; trial < 200; ++trial) {
    std::shuffle(order.begin(), order.end(), random);
    const std::vector<RowTotals> found = merged(problem, parts, order, trial % 2 ? 4 : 1);
    for (int64_t row = 0; row < num_rows; ++row) {
      const RowTotals &a = found[row], &b = wanted[row];
      if (a.max != b.max || a.sum != b.sum || a.smooth != b.smooth || a.product != b.product || a.max_before != b.max_before) {
        std::printf("order %d gives row %d other bits\n", trial, static_cast<int>(row));
        return 1;
      }
    }
  }
  return 0;
}
