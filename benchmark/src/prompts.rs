//! Prompts of a wanted number of tokens, made of common words, no two alike.

use rand::rngs::StdRng;
use rand::seq::IndexedRandom;
use rand::{Rng, SeedableRng};

const WORDS: &str = "the of and to in is it that was for on are with as at be this have from or one had by word but not \
    what all were we when your can said there use an each which she do how their if will up other about out many then \
    them these so some her would make like him into time has look two more write go see number no way could people my \
    than first water been call who oil its now find long down day did get come made may part";

/// Makes prompts by the number of words; how many tokens a word takes is measured with the server.
#[derive(Debug, Clone)]
pub struct Prompts {
    words: Vec<&'static str>,
    count: usize,
    seed: u64,
}

impl Prompts {
    /// Prompts of `count` words each.
    pub fn of_words(count: usize, seed: u64) -> Self {
        Self {
            words: WORDS.split_whitespace().collect(),
            count: count.max(1),
            seed,
        }
    }

    /// Prompts of about `tokens` tokens, given how many tokens the server counts in prompts of two lengths, in words.
    pub fn of_tokens(tokens: u32, seed: u64, short: (usize, u64), long: (usize, u64)) -> Self {
        let per_word = (long.1 as f64 - short.1 as f64) / (long.0 - short.0) as f64;
        let fixed = short.1 as f64 - per_word * short.0 as f64;
        let words = if per_word > 0.0 {
            (f64::from(tokens) - fixed) / per_word
        } else {
            f64::from(tokens)
        };
        Self::of_words(words.round().max(1.0) as usize, seed)
    }

    /// The prompt of one request.
    pub fn prompt(&self, request: u64) -> String {
        let mut random =
            StdRng::seed_from_u64(self.seed.wrapping_mul(0x9e37_79b9_7f4a_7c15) ^ request);
        let mut words: Vec<&str> = Vec::with_capacity(self.count);
        words.extend((0..self.count).filter_map(|_| self.words.choose(&mut random)));
        words.join(" ")
    }
}

/// The waits between requests that come at random, so many a second.
pub fn arrival(random: &mut StdRng, rate: f64) -> f64 {
    -(1.0 - random.random::<f64>()).ln() / rate
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn prompts_have_the_wanted_length_and_differ() {
        let prompts = Prompts::of_words(40, 1);
        assert_eq!(prompts.prompt(0).split(' ').count(), 40);
        assert_eq!(prompts.prompt(7), prompts.prompt(7));
        assert_ne!(prompts.prompt(0), prompts.prompt(1));
        assert_ne!(prompts.prompt(0), Prompts::of_words(40, 2).prompt(0));
    }

    #[test]
    fn words_are_fitted_to_tokens() {
        // One token at the start, and 1.5 for each word.
        let prompts = Prompts::of_tokens(61, 0, (20, 31), (60, 91));
        assert_eq!(prompts.prompt(0).split(' ').count(), 40);
        assert_eq!(
            Prompts::of_tokens(1, 0, (20, 31), (60, 91))
                .prompt(0)
                .split(' ')
                .count(),
            1
        );
    }

    #[test]
    fn arrivals_keep_their_rate() {
        let mut random = StdRng::seed_from_u64(3);
        let total: f64 = (0..10_000).map(|_| arrival(&mut random, 5.0)).sum();
        assert!((total - 2000.0).abs() < 100.0, "{total}");
    }
}
