//! Several answers in one stream of events.

use async_stream::stream;
use futures::stream::{BoxStream, StreamExt, select_all};

use super::answers::AnswerDetails;
use super::fields::details;
use crate::api::answer::{EndReason, Figures, Generation, Part, TextToken};
use crate::api::error::ApiError;

/// A token of one of several answers.
pub struct Indexed {
    /// Which answer.
    pub index: usize,
    /// The token.
    pub token: TextToken,
    /// On the last token: why, the final figures, and what is told beyond OpenAI's fields.
    pub end: Option<(EndReason, Figures, AnswerDetails)>,
}

/// The tokens of all answers as they come. An error ends its own answer; the caller ends the others.
pub fn tokens(generations: Vec<Generation>) -> BoxStream<'static, Result<Indexed, ApiError>> {
    let each = generations
        .into_iter()
        .enumerate()
        .map(|(index, generation)| one(index, generation));
    select_all(each).boxed()
}

fn one(index: usize, mut generation: Generation) -> BoxStream<'static, Result<Indexed, ApiError>> {
    stream! {
        loop {
            match generation.next().await {
                Ok(Some(Part::Prompt(_))) => {}
                Ok(Some(Part::Token(token))) => yield Ok(Indexed { index, token, end: None }),
                Ok(Some(Part::Last(token, reason))) => {
                    let figures = generation.figures;
                    let told = details(generation.adapter.as_ref(), generation.seed, &figures);
                    yield Ok(Indexed { index, token, end: Some((reason, figures, told)) });
                }
                Ok(None) => break,
                Err(error) => { yield Err(error); break; }
            }
        }
    }
    .boxed()
}
