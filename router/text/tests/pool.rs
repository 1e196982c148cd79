//! The tokenizer pool: limits before work, offsets in characters.
#![allow(clippy::unwrap_used)]

mod support;

use std::sync::Arc;
use std::time::{Duration, Instant};

use kvrun_text::{EncodeError, Tokenizer, TokenizerPool};

fn pool() -> TokenizerPool {
    let tokenizer = Arc::into_inner(support::sentence_piece()).unwrap();
    TokenizerPool::start(tokenizer, 2, 4, Duration::from_secs(10)).unwrap()
}

#[tokio::test]
async fn a_text_that_takes_too_long_is_refused_and_its_worker_comes_back() {
    let limit = Duration::from_millis(50);
    let tokenizer = Arc::into_inner(support::sentence_piece()).unwrap();
    let pool = TokenizerPool::start(tokenizer, 1, 4, limit).unwrap();
    let long = "the ".repeat(150_000);
    let begun = Instant::now();
    let refused = pool.encode(long, true, usize::MAX).await.unwrap_err();
    assert_eq!(refused, EncodeError::TooSlow { limit });
    let answered = begun.elapsed();
    // The only worker is busy with it still.
    let waiting = pool.encode("the".into(), true, 100).await.unwrap_err();
    assert_eq!(waiting, EncodeError::Busy);
    while pool.encode("the".into(), true, 100).await.is_err() {
        assert!(begun.elapsed() < Duration::from_secs(60));
    }
    let through = begun.elapsed();
    assert!(
        answered < through / 2,
        "answered {answered:?}, through {through:?}"
    );
}

#[tokio::test]
async fn text_beyond_the_byte_limit_is_refused_unread() {
    let refused = pool().encode("the the".into(), true, 6).await.unwrap_err();
    assert_eq!(refused, EncodeError::TooLong { bytes: 7, limit: 6 });
}

#[tokio::test]
async fn special_tokens_are_added_when_asked() {
    let pool = pool();
    let with = pool.encode("the".into(), true, 100).await.unwrap();
    let without = pool.encode("the".into(), false, 100).await.unwrap();
    assert_eq!(with.ids[0], 1);
    assert_eq!(with.ids[1..], without.ids);
}

#[tokio::test]
async fn offsets_count_characters() {
    let encoded = pool().encode("é b".into(), false, 100).await.unwrap();
    let ends: Vec<usize> = encoded.offsets.iter().map(|offset| offset.1).collect();
    assert_eq!(ends.last(), Some(&3));
}

#[tokio::test]
async fn many_texts_at_once_are_all_answered_or_told_to_wait() {
    let pool = pool();
    let texts = (0..64).map(|_| {
        let pool = pool.clone();
        async move { pool.encode("the the the".into(), false, 100).await }
    });
    let answers = futures_join(texts).await;
    assert!(answers.iter().any(Result::is_ok));
    assert!(
        answers
            .iter()
            .all(|answer| !matches!(answer, Err(EncodeError::Unfit(_))))
    );
}

async fn futures_join<F: Future + Send + 'static>(
    futures: impl Iterator<Item = F>,
) -> Vec<F::Output>
where
    F::Output: Send,
{
    let tasks: Vec<_> = futures.map(|future| tokio::spawn(future)).collect();
    let mut outputs = vec![];
    for task in tasks {
        outputs.push(task.await.unwrap());
    }
    outputs
}

#[test]
fn a_missing_tokenizer_is_named() {
    let error = Tokenizer::load(std::path::Path::new("/nonexistent"))
        .err()
        .unwrap()
        .to_string();
    assert!(error.contains("/nonexistent/tokenizer.json"), "{error}");
}
