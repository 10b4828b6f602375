// Decodes with a file that `dllm-hf export-edge` has written, by static quotas or a threshold. Token ids in, token ids out:
//
//   decode model.pte --new 32 --block 32 --steps 16 --policy dual < prompt_ids.txt
//
// It gives the tokens of `DiffusionEdge.diffusion_generate` at temperature 0: `low_confidence_static`, and
// `low_confidence_dynamic` with --threshold. docs/edge.md says what the methods of the file take.

#include <executorch/extension/module/module.h>
#include <executorch/extension/tensor/tensor.h>

#include <algorithm>
#include <chrono>
#include <cmath>
#include <cstdint>
#include <iostream>
#include <limits>
#include <map>
#include <numeric>
#include <stdexcept>
#include <string>
#include <vector>

using executorch::extension::Module;
using executorch::runtime::EValue;
using Ids = std::vector<int64_t>;

struct Options {
  std::string file, policy;
  int64_t new_tokens = 32, block = 0, steps = 0, eos = -1;
  float threshold = -1;  // below 0: static quotas
};

// The columns that a pass feeds, and the block whose logits it gives.
struct Window {
  int64_t start, end, first, last, seen, grid;
};

class Program {
 public:
  // The last argument lets `prefill` and `step` share their cache, as `load_method` twice on one program does in Python.
  explicit Program(const std::string& file) : module_(file, Module::LoadMode::File, nullptr, nullptr, nullptr, true) {
    rows = constant("max_rows"), columns = constant("max_columns"), block = constant("max_block_length");
    step_window = constant("step_window"), vocab = constant("vocab_size"), mask = constant("mask_token_id");
    shift = constant("logits_shift"), sees_earlier_blocks = constant("sees_earlier_blocks");
    if (mask < 0) throw std::runtime_error("the file has no mask token: set it in the configuration, and export again");
    for (const std::string name : {"prefill", "step"})
      if (const auto error = module_.load_method(name); error != executorch::runtime::Error::Ok)
        throw std::runtime_error(name + " cannot be loaded, ExecuTorch's error " + std::to_string(int(error)) +
                                 ": the file is cut short, or needs a delegate or operators that this program is not linked with");
  }

  // The logits of a block, (block, vocab); the next pass overwrites them. All rows of the file are computed: those without a
  // text write to its scratch column.
  const float* run(const Ids& text, const Window& window) {
    const int64_t width = window.end - window.start;
    const bool is_step = step_window / 2 < width && width <= step_window;
    const int64_t fed = is_step ? step_window : std::max<int64_t>(width, 2);
    Ids tokens(rows * fed, 0), places(rows * fed, columns), lengths(rows * fed, 1), keep(rows * block, 0);
    for (int64_t i = 0; i < fed; i++) {
      const int64_t column = std::min(window.start + i, window.end - 1);  // padding repeats the last column
      tokens[i] = text[column], places[i] = column;
      lengths[i] = window.grid ? std::min((column / window.grid + 1) * window.grid, window.end) : window.seen;
    }
    for (int64_t i = 0; i < block; i++) {
      const int64_t column = std::max<int64_t>(std::min(window.first + i, window.last - 1) - shift, 0);
      keep[i] = std::clamp<int64_t>(column - window.start, 0, width - 1);
    }
    auto inputs = std::vector<executorch::extension::TensorPtr>{};
    for (Ids* each : {&tokens, &places, &lengths, &keep})
      inputs.push_back(executorch::extension::from_blob(
          each->data(), {int(rows), int(each->size() / rows)}, executorch::aten::ScalarType::Long));
    auto result = module_.execute(is_step ? "step" : "prefill", {*inputs[0], *inputs[1], *inputs[2], *inputs[3]});
    if (!result.ok()) throw std::runtime_error("a pass failed with ExecuTorch's error " + std::to_string(int(result.error())));
    output_ = result->at(0);
    return output_.toTensor().const_data_ptr<float>();
  }

  int64_t rows, columns, block, step_window, vocab, mask, shift, sees_earlier_blocks;

 private:
  int64_t constant(const std::string& name) {
    auto result = module_.execute(name);
    if (!result.ok()) throw std::runtime_error("the file cannot be read, or has no method " + name + ": export it again");
    return result->at(0).toInt();
  }

  Module module_;
  EValue output_;
};

// The likeliest token but the mask, and its probability, in which the mask counts.
std::pair<int64_t, float> propose(const float* logits, int64_t vocab, int64_t mask) {
  int64_t best = mask == 0;
  float highest = logits[mask];
  for (int64_t token = 0; token < vocab; token++) {
    if (token != mask && logits[token] > logits[best]) best = token;
    highest = std::max(highest, logits[token]);
  }
  double total = 0;
  for (int64_t token = 0; token < vocab; token++) total += std::exp(logits[token] - highest);
  return {best, float(std::exp(logits[best] - highest - std::log(total)))};
}

// Positions by falling probability. Probabilities that differ by no more than rounding tie, and the leftmost goes first.
std::vector<size_t> ranked(const std::vector<float>& scores) {
  std::vector<size_t> order(scores.size()), group(scores.size(), 0);
  std::iota(order.begin(), order.end(), 0);
  std::stable_sort(order.begin(), order.end(), [&](size_t a, size_t b) { return scores[a] > scores[b]; });
  for (size_t i = 1; i < order.size(); i++) {
    const float before = scores[order[i - 1]], tolerance = std::min(5e-7f * (1 + before), 4e-6f * before);
    group[order[i]] = group[order[i - 1]] + (before - scores[order[i]] > tolerance);
  }
  std::stable_sort(order.begin(), order.end(),
                   [&](size_t a, size_t b) { return std::make_pair(group[a], a) < std::make_pair(group[b], b); });
  return order;
}

class Decoding {
 public:
  Decoding(Program& program, const Options& options, const Ids& prompt)
      : program_(program), options_(options), text_(prompt), shown_(prompt.size() + options.new_tokens) {
    const int64_t length = options.block;
    text_.resize(shown_, program.mask);
    if (program.sees_earlier_blocks) text_.resize((shown_ + length - 1) / length * length, program.mask);
    if (int64_t(text_.size()) > program.columns)
      throw std::runtime_error("a canvas of " + std::to_string(text_.size()) + " columns does not fit into the " +
                               std::to_string(program.columns) + " of the file: lower --new or shorten the prompt");
    // Blocks lie on a grid from column 0 where they see earlier ones alone, else from the end of the prompt.
    start_ = program.sees_earlier_blocks ? prompt.size() / length * length : prompt.size();
  }

  Ids run() {
    const int64_t size = text_.size(), prompt = shown_ - options_.new_tokens;
    for (; start_ < shown_; start_ += options_.block) {
      end_ = std::min(start_ + options_.block, size);
      decode_block();
      const auto first = text_.begin() + std::max(start_, prompt), last = text_.begin() + std::min(end_, shown_);
      if (const auto found = std::find(first, last, options_.eos); options_.eos >= 0 && found != last) {
        shown_ = found - text_.begin() + 1;
        break;
      }
    }
    return {text_.begin() + prompt, text_.begin() + shown_};
  }

  int64_t passes = 0;

 private:
  void decode_block() {
    const int64_t masks = std::count(text_.begin() + start_, text_.begin() + end_, program_.mask);
    const int64_t steps = options_.steps ? std::min(options_.steps, masks) : masks;
    for (int64_t step = 0; step < steps && is_open(); step++) {
      const float* logits = program_.run(text_, window(step == 0));
      passes++;
      transfer(logits, masks / steps + (step < masks % steps));
    }
  }

  bool is_open() const {
    const auto last = text_.begin() + std::min(end_, shown_);
    return std::find(text_.begin() + start_, last, program_.mask) != last;
  }

  Window window(bool is_first) {
    const int64_t size = text_.size(), grid = program_.sees_earlier_blocks ? options_.block : 0;
    const std::string& policy = options_.policy;
    Window found{0, size, start_, end_, size, grid};
    if (policy == "block") {  // also what is final since the last pass that fed it
      found.start = is_first ? final_ : start_, found.end = end_;
      final_ = start_;
    } else if (policy != "none" && !is_first) {
      found.start = std::max<int64_t>(start_ - program_.shift, 0);
      found.end = policy == "dual" ? end_ : size;
    }
    return found;
  }

  // The likeliest `quota` of the proposals; with a threshold all above it, if those are at least as many.
  void transfer(const float* logits, int64_t quota) {
    Ids places, tokens;
    std::vector<float> scores;
    for (int64_t column = start_; column < end_; column++) {
      if (text_[column] != program_.mask) continue;
      const auto [token, score] = propose(logits + (column - start_) * program_.vocab, program_.vocab, program_.mask);
      places.push_back(column), tokens.push_back(token), scores.push_back(score);
    }
    const auto is_above = [&](float score) { return options_.threshold >= 0 && score > options_.threshold; };
    const bool takes_all_above = std::count_if(scores.begin(), scores.end(), is_above) >= quota;
    const auto order = ranked(scores);
    for (int64_t rank = 0; rank < int64_t(order.size()); rank++) {
      const size_t index = order[rank];
      if (takes_all_above ? is_above(scores[index]) : rank < quota) text_[places[index]] = tokens[index];
    }
  }

  Program& program_;
  const Options& options_;
  Ids text_;
  int64_t shown_, start_, end_ = 0, final_ = 0;
};

Options parse(int argc, char** argv, const std::string& usage) {
  if (argc < 2 || argc % 2) throw std::runtime_error(usage);
  Options options;
  options.file = argv[1];
  std::map<std::string, std::string> given;
  for (int i = 2; i < argc; i += 2) given[argv[i]] = argv[i + 1];
  const auto number = [&](const std::string& name, int64_t least, int64_t otherwise) {
    if (!given.count(name)) return otherwise;
    size_t read = 0;
    const std::string text = given[name];
    int64_t value = 0;
    try { value = std::stoll(text, &read); } catch (const std::exception&) {}
    if (text.empty() || read != text.size() || value < least)
      throw std::runtime_error(name + " must be a number of at least " + std::to_string(least) + ", but is '" + text + "'");
    given.erase(name);
    return value;
  };
  options.new_tokens = number("--new", 1, 32);
  options.block = number("--block", 1, 0);
  options.steps = number("--steps", 1, 0);
  options.eos = number("--eos", 0, -1);
  if (given.count("--threshold")) {
    char* end = nullptr;
    options.threshold = std::strtof(given["--threshold"].c_str(), &end);
    if (*end || given["--threshold"].empty() || !(options.threshold >= 0 && options.threshold <= 1))
      throw std::runtime_error("--threshold must be a probability, but is '" + given["--threshold"] + "'");
    given.erase("--threshold");
  }
  options.policy = given["--policy"], given.erase("--policy");
  if (!given.empty()) throw std::runtime_error("unknown option " + given.begin()->first + "\n" + usage);
  return options;
}

void complete(Options& options, const Program& program) {
  if (!options.block) options.block = program.block;
  if (options.block > program.block)
    throw std::runtime_error("--block " + std::to_string(options.block) + " is longer than the " +
                             std::to_string(program.block) + " of the file");
  const std::vector<std::string> offered =
      program.sees_earlier_blocks ? std::vector<std::string>{"block", "none"} : std::vector<std::string>{"dual", "prefix", "none"};
  if (options.policy.empty()) options.policy = offered[0];
  if (std::find(offered.begin(), offered.end(), options.policy) == offered.end())
    throw std::runtime_error("--policy " + options.policy + " is not one that this model has (" + offered[0] + ", " + offered[1] + " ...)");
}

int main(int argc, char** argv) try {
  Options options = parse(argc, argv,
      "usage: decode MODEL.pte [--new 32] [--block N] [--steps N] [--threshold P] [--eos ID] [--policy dual|prefix|block|none] < ids");
  Program program(options.file);
  complete(options, program);
  Ids prompt;
  for (int64_t id; std::cin >> id; prompt.push_back(id))
    if (id < 0 || id >= program.vocab) throw std::runtime_error("the prompt's id " + std::to_string(id) + " is not in the vocabulary of " + std::to_string(program.vocab));
  if (!std::cin.eof()) throw std::runtime_error("the prompt must be token ids, separated by white space");
  if (std::find(prompt.begin(), prompt.end(), program.mask) != prompt.end()) throw std::runtime_error("the prompt holds the mask token: infilling is Python's");
  Decoding decoding(program, options, prompt);
  const auto began = std::chrono::steady_clock::now();
  const Ids found = decoding.run();
  const std::chrono::duration<double> seconds = std::chrono::steady_clock::now() - began;
  for (size_t i = 0; i < found.size(); i++) std::cout << (i ? " " : "") << found[i];
  std::cout << std::endl;
  std::cerr << found.size() << " tokens, " << decoding.passes << " forward passes, " << seconds.count() << " s\n";
} catch (const std::exception& error) {
  std::cerr << "decode: error: " << error.what() << "\n";
  return 2;
}
