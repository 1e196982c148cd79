//! An answer that is sent when all of it is there.

use super::answer::{EndReason, Figures, Generation, Part, TextToken};
use super::error::{ApiError, Kind};
use crate::request::TokenInfo;

/// A whole answer.
#[derive(Debug, Clone)]
pub struct Whole {
    /// Its text.
    pub text: String,
    /// Its tokens, end token included.
    pub tokens: Vec<TextToken>,
    /// Log-probabilities of the prompt after its first token, if they were asked for.
    pub prompt: Vec<TokenInfo>,
    /// Why it ended.
    pub reason: EndReason,
    /// The seed, when chance played a part.
    pub seed: Option<u64>,
    /// Times and sizes.
    pub figures: Figures,
}

impl Whole {
    /// Waits for every part of an answer.
    pub async fn collect(mut generation: Generation) -> Result<Self, ApiError> {
        let (mut tokens, mut prompt) = (vec![], vec![]);
        let reason = loop {
            match generation.next().await? {
                Some(Part::Prompt(infos)) => prompt.extend(infos),
                Some(Part::Token(token)) => tokens.push(token),
                Some(Part::Last(token, reason)) => {
                    tokens.push(token);
                    break reason;
                }
                None => {
                    return Err(ApiError::new(
                        Kind::Incomplete,
                        "the answer broke off; send the request again",
                    ));
                }
            }
        };
        let text = tokens
            .iter()
            .filter(|token| !token.special)
            .map(|token| token.text.as_str())
            .collect();
        Ok(Self {
            text,
            tokens,
            prompt,
            reason,
            seed: generation.seed,
            figures: generation.figures,
        })
    }

    /// The mean log-probability of its tokens; the better of two answers has the greater one.
    pub fn score(&self) -> f32 {
        let sum: f32 = self.tokens.iter().map(|token| token.info.logprob).sum();
        sum / self.tokens.len().max(1) as f32
    }
}
