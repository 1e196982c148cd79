//! The stop matcher against a search over the whole text.
#![allow(clippy::unwrap_used)]

use kvrun_text::StopMatcher;
use proptest::prelude::*;

/// The same rule over the whole text: the stop that ends first wins, the longest of those that end together.
fn naive(text: &str, stops: &[String]) -> (String, Option<usize>) {
    for end in 0..=text.len() {
        let ending = stops
            .iter()
            .enumerate()
            .filter(|(_, stop)| {
                !stop.is_empty() && text.as_bytes()[..end].ends_with(stop.as_bytes())
            })
            .max_by_key(|(number, stop)| (stop.len(), std::cmp::Reverse(*number)));
        if let Some((number, stop)) = ending {
            return (text[..end - stop.len()].to_owned(), Some(number));
        }
    }
    (text.to_owned(), None)
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(20_000))]

    #[test]
    fn pieces_give_what_the_whole_gives(
        pieces in prop::collection::vec("[abé]{0,4}", 0..10),
        stops in prop::collection::vec("[abé]{1,5}", 0..4),
    ) {
        let mut matcher = StopMatcher::new(&stops);
        let (mut text, mut stopped) = (String::new(), None);
        for piece in &pieces {
            let pushed = matcher.push(piece);
            text.push_str(&pushed.text);
            if pushed.stopped.is_some() {
                stopped = pushed.stopped;
                break;
            }
        }
        if stopped.is_none() {
            text.push_str(&matcher.flush());
        }
        prop_assert_eq!((text, stopped), naive(&pieces.concat(), &stops));
    }

    #[test]
    fn a_kept_stop_ends_the_text_and_nothing_is_held_back(
        pieces in prop::collection::vec("[abé]{0,4}", 0..10),
        stops in prop::collection::vec("[abé]{1,5}", 0..4),
    ) {
        let mut matcher = StopMatcher::keeping(&stops);
        let (mut text, mut stopped) = (String::new(), None);
        for piece in &pieces {
            let pushed = matcher.push(piece);
            text.push_str(&pushed.text);
            if pushed.stopped.is_some() {
                stopped = pushed.stopped;
                break;
            }
            prop_assert_eq!(&pushed.text, piece);
            prop_assert!(!matcher.holds());
        }
        prop_assert_eq!(matcher.flush(), "");
        let (mut expected, which) = naive(&pieces.concat(), &stops);
        expected.push_str(which.map_or("", |which| &stops[which]));
        prop_assert_eq!((text, stopped), (expected, which));
    }

    #[test]
    fn held_text_is_a_proper_beginning_of_a_stop(
        pieces in prop::collection::vec("[abé]{0,4}", 0..10),
        stops in prop::collection::vec("[abé]{1,5}", 1..4),
    ) {
        let mut matcher = StopMatcher::new(&stops);
        let (mut seen, mut out) = (String::new(), String::new());
        for piece in &pieces {
            seen.push_str(piece);
            let pushed = matcher.push(piece);
            out.push_str(&pushed.text);
            if pushed.stopped.is_some() {
                break;
            }
            let held = &seen[out.len()..];
            prop_assert!(held.is_empty() || stops.iter().any(|stop| stop.starts_with(held) && stop != held));
            prop_assert_eq!(matcher.holds(), !held.is_empty());
        }
    }
}

#[test]
fn a_stop_over_several_pieces_is_cut_exactly() {
    let mut matcher = StopMatcher::new(&["\n\nUser:".to_owned()]);
    assert_eq!(matcher.push("Hi.\n").text, "Hi.");
    assert_eq!(matcher.push("\nUs").text, "");
    let last = matcher.push("er: more");
    assert_eq!((last.text.as_str(), last.stopped), ("", Some(0)));
}

#[test]
fn a_false_alarm_gives_everything_back() {
    let mut matcher = StopMatcher::new(&["abc".to_owned()]);
    assert_eq!(matcher.push("xab").text, "x");
    assert_eq!(matcher.push("abd").text, "ababd");
    assert_eq!(matcher.flush(), "");
}
