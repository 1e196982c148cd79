//! Images written into a prompt's text, and found again among its ids.
//!
//! What stands for an image goes into the text before that is tokenized, since line breaks or spaces on both sides of its
//! edge may share a token.

use std::borrow::Cow;
use std::iter::repeat_n;

use kvrun_proto::image_rule::Layout;
use kvrun_proto::{ImageRule, Spaces};

use super::{ImageError, Size, count};

/// A prompt with a placeholder for each picture of its images.
#[derive(Debug, PartialEq)]
pub struct Written {
    /// The text to tokenize.
    pub text: String,
    pictures: Vec<Pictures>,
}

/// What one image is shown as.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct Pictures {
    /// Placeholders in the text.
    count: usize,
    /// Ids that each of them becomes.
    features: usize,
}

/// Ids with those of images among them.
#[derive(Debug, Default, PartialEq)]
pub struct Placed {
    /// All ids.
    pub ids: Vec<u32>,
    /// Of each image, where the first id that stands for a part of it is, and how many there are up to the last.
    pub spans: Vec<(u32, u32)>,
}

/// Puts images of these sizes in the places of their marker; `placeholder` is the text of the rule's token.
pub fn write(
    rule: &ImageRule,
    placeholder: &str,
    text: &str,
    images: &[Size],
) -> Result<Written, ImageError> {
    let parts: Vec<&str> = text.split(&rule.marker).collect();
    if parts.len() != images.len() + 1 {
        return Err(misplaced(rule, images.len(), parts.len() - 1));
    }
    let kept = |part: &str| match rule.spaces() {
        Spaces::Trimmed => part.trim_matches(' ').to_owned(),
        Spaces::Kept | Spaces::Parted => part.to_owned(),
    };
    let mut whole = kept(parts[0]);
    let mut pictures = Vec::with_capacity(images.len());
    for (place, &size) in images.iter().enumerate() {
        let beside_another = place > 0 && parts[place].is_empty();
        let shown = shown(rule, size);
        whole.push_str(match beside_another {
            true => shown.strip_prefix(&rule.border).unwrap_or(&shown),
            false => &shown,
        });
        whole.push_str(&kept(parts[place + 1]));
        pictures.push(Pictures {
            count: shown.matches(placeholder).count(),
            features: count::features(rule, size)?,
        });
    }
    if rule.spaces() == Spaces::Parted && !rule.border.is_empty() {
        whole = parted(&whole, &rule.border);
    }
    Ok(Written {
        text: whole,
        pictures,
    })
}

/// What an image of this size is written as.
fn shown(rule: &ImageRule, size: Size) -> Cow<'_, str> {
    let picture = rule.text.as_str();
    let (panned, crops) = match &rule.layout {
        Some(Layout::Panned(panned)) => (panned, count::crops(panned, size)),
        _ => return Cow::Borrowed(picture),
    };
    if crops == 0 {
        return Cow::Borrowed(picture);
    }
    let crops = vec![picture; crops as usize].join(&panned.between_crops);
    let (before_whole, before_crops) = (&panned.before_whole, &panned.before_crops);
    Cow::Owned(format!("{before_whole}{picture}{before_crops}{crops}"))
}

impl Written {
    /// Gives each picture as many ids as it has features. The ids are those of the text.
    pub fn place(&self, rule: &ImageRule, ids: &[u32]) -> Result<Placed, ImageError> {
        let pictures = self.pictures.iter().enumerate();
        let mut pictures =
            pictures.flat_map(|(image, each)| repeat_n((image, each.features), each.count));
        let mut placed = Placed::default();
        for &id in ids {
            if id != rule.token {
                placed.ids.push(id);
                continue;
            }
            let Some((image, features)) = pictures.next() else {
                return Err(self.misplaced(rule, ids));
            };
            let start = placed.ids.len() as u32;
            placed.ids.extend(repeat_n(id, features));
            let end = placed.ids.len() as u32;
            match placed.spans.get_mut(image) {
                Some((first, tokens)) => *tokens = end - *first,
                None => placed.spans.push((start, end - start)),
            }
        }
        match pictures.next() {
            None => Ok(placed),
            Some(_) => Err(self.misplaced(rule, ids)),
        }
    }

    /// Somebody wrote the placeholder's own text beside those of images.
    fn misplaced(&self, rule: &ImageRule, ids: &[u32]) -> ImageError {
        let found = ids.iter().filter(|&&id| id == rule.token).count();
        let ours: usize = self.pictures.iter().map(|each| each.count).sum();
        let images = self.pictures.len();
        misplaced(rule, images, (images + found).saturating_sub(ours))
    }
}

/// Refuses ids of which one stands for an image; `marker` is the marker's id, where it has one.
pub fn refuse_places(rule: &ImageRule, marker: Option<u32>, ids: &[u32]) -> Result<(), ImageError> {
    let is_place = |id: &&u32| **id == rule.token || Some(**id) == marker;
    match ids.iter().filter(is_place).count() {
        0 => Ok(()),
        places => Err(misplaced(rule, 0, places)),
    }
}

fn misplaced(rule: &ImageRule, images: usize, places: usize) -> ImageError {
    ImageError::Misplaced {
        images,
        places,
        marker: rule.marker.clone(),
    }
}

/// A space between each border and a word right behind it.
fn parted(text: &str, border: &str) -> String {
    let mut pieces = text.split(border);
    let mut whole = pieces.next().unwrap_or_default().to_owned();
    for piece in pieces {
        whole.push_str(border);
        let word = |first: char| !first.is_whitespace() && first != '<';
        if piece.starts_with(word) {
            whole.push(' ');
        }
        whole.push_str(piece);
    }
    whole
}

#[cfg(test)]
mod tests {
    use super::*;
    use kvrun_proto::{FixedImage, PannedImage};

    const SIZE: Size = Size {
        height: 4,
        width: 4,
    };

    fn rule(text: &str, border: &str, spaces: Spaces) -> ImageRule {
        ImageRule {
            marker: "<i>".to_owned(),
            token: 9,
            layout: Some(Layout::Fixed(FixedImage { features: 3 })),
            text: text.to_owned(),
            border: border.to_owned(),
            spaces: spaces.into(),
            ..Default::default()
        }
    }

    fn written(rule: &ImageRule, text: &str) -> String {
        let images = vec![SIZE; text.matches("<i>").count()];
        write(rule, "<p>", text, &images).unwrap().text
    }

    #[test]
    fn an_image_is_written_as_its_rule_says() {
        let kept = rule("\n<p>\n", "", Spaces::Kept);
        assert_eq!(
            written(&kept, " a\n<i> <i><i>"),
            " a\n\n<p>\n \n<p>\n\n<p>\n"
        );
        let trimmed = rule("|<p>|", "|", Spaces::Trimmed);
        assert_eq!(written(&trimmed, " a  "), "a");
        assert_eq!(
            written(&trimmed, " a <i><i>  <i>\n b "),
            "a|<p>|<p>||<p>|\n b"
        );
        let parted = rule("|<p>|<p>|", "|", Spaces::Parted);
        assert_eq!(
            written(&parted, "a<i><i>b<i> c<i>"),
            "a|<p>|<p>|<p>|<p>| b|<p>|<p>| c|<p>|<p>|"
        );
    }

    #[test]
    fn crops_are_written_behind_the_image_that_they_are_of() {
        let panned = PannedImage {
            features: 3,
            shortest: 4,
            most: 3,
            ratio: 1.5,
            before_whole: "All ".to_owned(),
            before_crops: " parts ".to_owned(),
            between_crops: " ".to_owned(),
        };
        let rule = ImageRule {
            layout: Some(Layout::Panned(panned)),
            ..rule("|<p>|", "", Spaces::Kept)
        };
        let size = |height, width| Size { height, width };
        let written = write(&rule, "<p>", "<i>, <i>", &[size(4, 5), size(9, 4)]).unwrap();
        assert_eq!(written.text, "|<p>|, All |<p>| parts |<p>| |<p>|");
        let placed = written.place(&rule, &[9, 1, 9, 1, 9, 9]).unwrap();
        let ids = [&[9; 3][..], &[1], &[9; 3], &[1], &[9; 6]].concat();
        assert_eq!(placed.ids, ids);
        assert_eq!(placed.spans, [(0, 3), (4, 10)]);
    }

    #[test]
    fn every_placeholder_becomes_the_features_of_its_picture() {
        let rule = rule("|<p>|<p>|", "|", Spaces::Kept);
        let written = write(&rule, "<p>", "<i><i>", &[SIZE, SIZE]).unwrap();
        let placed = written
            .place(&rule, &[1, 9, 1, 9, 1, 9, 1, 9, 1, 5])
            .unwrap();
        let picture = [9, 9, 9, 1];
        assert_eq!(placed.ids, [&[1][..], &picture.repeat(4), &[5]].concat());
        assert_eq!(placed.spans, [(1, 7), (9, 7)]);
    }

    #[test]
    fn markers_and_images_must_be_equally_many() {
        let rule = rule("<p>", "", Spaces::Kept);
        let places = |error| match error {
            ImageError::Misplaced { images, places, .. } => (images, places),
            other => panic!("{other}"),
        };
        for (text, images, found) in [("<i> <i>", 1, 2), ("", 1, 0), ("<i>", 0, 1)] {
            let error = write(&rule, "<p>", text, &vec![SIZE; images]).unwrap_err();
            assert_eq!(places(error), (images, found));
        }
        let one = write(&rule, "<p>", "<i>", &[SIZE]).unwrap();
        for (ids, found) in [([9, 9], 2), ([5, 5], 0)] {
            assert_eq!(places(one.place(&rule, &ids).unwrap_err()), (1, found));
        }
        assert_eq!(
            places(refuse_places(&rule, Some(5), &[5, 9, 1]).unwrap_err()),
            (0, 2)
        );
        assert_eq!(refuse_places(&rule, None, &[5, 1]), Ok(()));
    }
}
