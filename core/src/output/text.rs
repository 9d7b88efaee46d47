//! Text from the traced system made fit to be shown.
//!
//! Names of functions, processes and files are chosen by whoever built or started the target: they may hold
//! terminal escape sequences, line breaks or marks that reverse the reading direction. [`visible`] turns those
//! into text that is read instead of obeyed; it is not HTML escaping, which comes on top.

use std::borrow::Cow;
use std::fmt::Write as _;

/// True for characters that steer a terminal or a text layout instead of being seen: control characters, line
/// separators, direction marks, zero-width characters and tags.
fn is_unseen(c: char) -> bool {
    c.is_control()
        || matches!(c,
            '\u{ad}' | '\u{61c}' | '\u{180e}' | '\u{200b}'..='\u{200f}' | '\u{2028}'..='\u{202e}' |
            '\u{2060}'..='\u{206f}' | '\u{feff}' | '\u{fff9}'..='\u{fffb}' | '\u{e0000}'..='\u{e007f}')
}

/// The text with every character that would not be seen written out, such as `\n`, `\x1b` or `\u{202e}`.
///
/// Applying it twice changes nothing more.
pub fn visible(text: &str) -> Cow<'_, str> {
    if !text.contains(is_unseen) {
        return Cow::Borrowed(text);
    }
    let mut out = String::with_capacity(text.len() + 16);
    for c in text.chars() {
        match c {
            '\n' => out.push_str("\\n"),
            '\r' => out.push_str("\\r"),
            '\t' => out.push_str("\\t"),
            c if is_unseen(c) => {
                // Writing to a string cannot fail.
                let _ = match u32::from(c) {
                    n @ 0..=0xff => write!(out, "\\x{n:02x}"),
                    n => write!(out, "\\u{{{n:x}}}"),
                };
            }
            c => out.push(c),
        }
    }
    Cow::Owned(out)
}

/// At most `max` characters: the end is replaced by `…` when there are more.
pub fn clip(text: &str, max: usize) -> Cow<'_, str> {
    if text.len() <= max || text.chars().nth(max).is_none() {
        return Cow::Borrowed(text);
    }
    let mut out: String = text.chars().take(max.saturating_sub(1)).collect();
    out.push('…');
    Cow::Owned(out)
}

/// At most `max` bytes: the end is replaced by `…` when there are more.
pub fn clip_bytes(text: &str, max: usize) -> Cow<'_, str> {
    const MARK: &str = "…";
    if text.len() <= max {
        return Cow::Borrowed(text);
    }
    Cow::Owned(format!("{}{MARK}", &text[..text.floor_char_boundary(max.saturating_sub(MARK.len()))]))
}

/// Lines of at most `width` characters, broken at spaces; a word that is longer is cut into pieces.
///
/// Empty for text without words.
pub fn wrap(text: &str, width: usize) -> Vec<String> {
    let width = width.max(1);
    let mut lines = Vec::new();
    let mut line = String::new();
    let mut used = 0;
    for word in text.split_whitespace() {
        let mut word: Vec<char> = word.chars().collect();
        if used > 0 && used + 1 + word.len() > width {
            lines.push(std::mem::take(&mut line));
            used = 0;
        }
        while word.len() > width {
            let rest = word.split_off(width);
            lines.push(word.into_iter().collect());
            word = rest;
        }
        if used > 0 {
            line.push(' ');
            used += 1;
        }
        used += word.len();
        line.extend(word);
    }
    if used > 0 {
        lines.push(line);
    }
    lines
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A name must not clear the reader's terminal, fake a line or reverse what follows.
    #[test]
    fn what_would_be_obeyed_is_written_out() {
        assert_eq!(visible("a\x1b[2Jb\nc\rd\te"), r"a\x1b[2Jb\nc\rd\te");
        assert_eq!(visible("x\u{202e}gpj\u{2066}y\u{9b}"), r"x\u{202e}gpj\u{2066}y\x9b");
        assert_eq!(visible("\u{200b}\u{2028}\u{feff}\0"), r"\u{200b}\u{2028}\u{feff}\x00");
    }

    /// Ordinary names, in any script, must stay readable and cost no copy.
    #[test]
    fn ordinary_text_is_left_alone() {
        for name in ["operator new(unsigned long)", "größe", "キャッシュ", r"back\slash", "<script>"] {
            assert!(matches!(visible(name), Cow::Borrowed(n) if n == name));
        }
    }

    /// Escaping an escaped text must not garble it: some text passes two layers.
    #[test]
    fn writing_out_twice_changes_nothing_more() {
        let once = visible("a\nb\u{202e}").into_owned();
        assert_eq!(visible(&once), once);
    }

    /// Clipping to bytes leaves what fits.
    #[test]
    fn clip_bytes_keeps_at_most_max_bytes() {
        assert_eq!(clip_bytes("four", 4), "four");
        assert_eq!(clip_bytes("fives", 4), "f…");
        // Never within a character.
        assert_eq!(clip_bytes("aéé.", 5), "a…");
        assert_eq!(clip_bytes(&"é".repeat(1000), 600).len(), 599);
    }

    /// Clipping counts characters, never splits one, and leaves what fits.
    #[test]
    fn clip_keeps_at_most_max_characters() {
        assert_eq!(clip("äöü", 3), "äöü");
        assert_eq!(clip("äöüß", 3), "äö…");
        assert_eq!(clip("abc", 0), "…");
    }

    /// No line of a report may be wider than asked for, whatever the words.
    #[test]
    fn wrap_never_exceeds_the_width() {
        assert_eq!(wrap("one two three", 7), ["one two", "three"]);
        assert_eq!(wrap("abcdefghij kl", 4), ["abcd", "efgh", "ij", "kl"]);
        assert!(wrap(" \n ", 10).is_empty());
    }
}
