//! How many prompt tokens go beside decoding rows: as many as hold up their next token by less than it takes anyway.
//!
//! On a machine where a prompt's tokens cost far more than the weights that a step reads, a step filled up with a prompt
//! stalls every stream for its time. How long steps take decides, so nobody has to say how fast the machine is. Answers
//! do not depend on where prompts are cut.

use crate::Time;

/// Least tokens that prompts get in a step, whatever they cost, so that they always advance.
const LEAST: f64 = 8.0;
/// What they get before anything is known.
const FIRST: f64 = 16.0;
/// A step that computes prompts beside decoding rows may take so many times what these take alone: steps differ by themselves,
/// and the slowest in a hundred shall stay below 2.5 times.
const SLOWDOWN: f64 = 1.7;
/// What is allowed grows by at most so much from a step to the next and falls at once: streams notice the slowest steps.
const GROWTH: f64 = 1.5;
/// Less counts as so much, in seconds.
const INSTANT: f64 = 1e-6;

/// What is known of the time of steps.
#[derive(Debug)]
pub(crate) struct Chunk {
    tokens: f64,
    /// Seconds of a step of decoding rows alone, smoothed, by how often their number halves before it is 1.
    alone: [Option<f64>; u32::BITS as usize],
}

impl Default for Chunk {
    fn default() -> Self {
        Self {
            tokens: FIRST,
            alone: [None; u32::BITS as usize],
        }
    }
}

impl Chunk {
    /// Most prompt tokens beside so many decoding rows. It is 0 until such rows went alone once, which is what the time
    /// of steps is compared with; they do at the next step.
    pub(crate) fn beside(&self, decoding: u32) -> u32 {
        match (decoding.checked_ilog2(), self.tokens as u32) {
            (None, _) => u32::MAX,
            (Some(class), tokens) => self.alone[class as usize].map_or(0, |_| tokens),
        }
    }

    /// A step of `decoding` rows and `prompt` tokens of prompts took so long.
    pub(crate) fn learn(&mut self, decoding: u32, prompt: u32, took: Time) {
        let took = took.as_secs_f64().max(INSTANT);
        let Some(class) = decoding.checked_ilog2() else {
            return;
        };
        let alone = &mut self.alone[class as usize];
        if prompt == 0 {
            *alone = Some(alone.map_or(took, |old| old + (took - old) / 4.0));
            return;
        }
        // More than was allowed is an image in one piece, of which chunks have nothing to learn.
        let allowed = self.tokens as u32;
        let Some(alone) = alone.filter(|_| prompt <= allowed) else {
            return;
        };
        let fits = f64::from(prompt) * SLOWDOWN * alone / took;
        // That a few tokens were fast does not say what many would be.
        if prompt == allowed || fits < f64::from(prompt) {
            self.tokens = fits.min(GROWTH * self.tokens).max(LEAST);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// What is allowed beside 4 rows after steps that took `alone` and so much for each prompt token, in microseconds.
    fn settled(chunk: &mut Chunk, steps: u32, alone: u64, each: u64) -> u32 {
        chunk.learn(4, 0, Time::from_micros(alone));
        for _ in 0..steps {
            let tokens = chunk.beside(4);
            let took = alone + each * u64::from(tokens);
            chunk.learn(4, tokens, Time::from_micros(took));
        }
        chunk.beside(4)
    }

    #[test]
    fn a_step_with_a_prompt_settles_at_seven_tenths_more_time_than_without() {
        for (alone, each) in [(60_000, 1000), (60_000, 3000), (10_000, 20)] {
            let tokens = settled(&mut Chunk::default(), 40, alone, each);
            let took = alone + each * u64::from(tokens);
            assert!((33 * alone..=35 * alone).contains(&(20 * took)), "{tokens}");
        }
    }

    #[test]
    fn it_grows_when_steps_are_fast_and_shrinks_when_they_are_slow() {
        let mut chunk = Chunk::default();
        let first = settled(&mut chunk, 0, 10_000, 0);
        let fast = settled(&mut chunk, 10, 10_000, 10);
        let slow = settled(&mut chunk, 10, 10_000, 200);
        assert!(first < slow && slow < fast, "{first} {slow} {fast}");
    }

    #[test]
    fn prompts_advance_however_slow_they_are() {
        let tokens = settled(&mut Chunk::default(), 50, 1000, 1_000_000);
        assert_eq!(tokens, LEAST as u32);
        let mut frozen = Chunk::default();
        frozen.learn(4, 0, Time::ZERO);
        frozen.learn(4, LEAST as u32, Time::from_secs(1000));
        assert_eq!(frozen.beside(4), LEAST as u32);
    }

    #[test]
    fn rows_go_alone_once_before_prompts_go_beside_so_many() {
        let mut chunk = Chunk::default();
        assert_eq!((chunk.beside(0), chunk.beside(4)), (u32::MAX, 0));
        chunk.learn(4, 0, Time::from_millis(10));
        assert!(chunk.beside(4) > 0 && chunk.beside(7) > 0);
        assert_eq!((chunk.beside(3), chunk.beside(8)), (0, 0));
    }

    #[test]
    fn neither_a_few_fast_tokens_nor_a_slow_image_changes_it() {
        let mut chunk = Chunk::default();
        let tokens = settled(&mut chunk, 10, 10_000, 50);
        chunk.learn(4, 3, Time::from_millis(10));
        chunk.learn(4, 1000, Time::from_secs(1));
        assert_eq!(chunk.beside(4), tokens);
        chunk.learn(4, tokens - 1, Time::from_secs(1));
        assert!(chunk.beside(4) < tokens);
    }
}
