//! Readable names from mangled ones, within a bound.
//!
//! Done here and not by the symbol reader, because a short hostile C++ name can stand for gigabytes of text: names
//! refer back to their own parts. Both demanglers write into a [`Bounded`] that stops them.

use std::fmt::{self, Write};

use cpp_demangle::{DemangleOptions, ParseOptions, Symbol};

/// Longest name that is shown, in bytes; a longer one ends in [`MARK`].
pub(super) const MAX_NAME: usize = 4096;
/// Longest mangled name that is taken apart; a longer one is shown as it is, cut.
const MAX_MANGLED: usize = 16 * 1024;
/// What a name that was cut ends in.
pub(super) const MARK: &str = "...";

/// Text that refuses to grow beyond [`MAX_NAME`].
#[derive(Default)]
struct Bounded {
    text: String,
    full: bool,
}

impl Write for Bounded {
    fn write_str(&mut self, s: &str) -> fmt::Result {
        let room = (MAX_NAME - MARK.len()).saturating_sub(self.text.len());
        if s.len() <= room {
            self.text.push_str(s);
            return Ok(());
        }
        self.text.push_str(&s[..s.floor_char_boundary(room)]);
        self.full = true;
        Err(fmt::Error)
    }
}

impl Bounded {
    /// The text; `None` when the writer gave up for a reason of its own.
    fn finish(mut self, result: fmt::Result) -> Option<String> {
        if self.full {
            self.text.push_str(MARK);
            return Some(self.text);
        }
        result.is_ok().then_some(self.text)
    }
}

/// The readable form of a symbol's name: Rust, else C++, else the name itself; at most [`MAX_NAME`] bytes.
pub(super) fn demangle(name: &str) -> String {
    let readable = if name.len() > MAX_MANGLED { None } else { rust(name).or_else(|| cpp(name)) };
    readable.unwrap_or_else(|| cut(name))
}

fn rust(name: &str) -> Option<String> {
    let symbol = rustc_demangle::try_demangle(name).ok()?;
    let mut out = Bounded::default();
    // The alternate form leaves the hash out.
    let result = write!(out, "{symbol:#}");
    out.finish(result)
}

fn cpp(name: &str) -> Option<String> {
    if !name.starts_with("_Z") && !name.starts_with("__Z") {
        return None;
    }
    let symbol = Symbol::new_with_options(name, &ParseOptions::default()).ok()?;
    let mut out = Bounded::default();
    let result = symbol.structured_demangle(&mut out, &DemangleOptions::default());
    out.finish(result)
}

/// The text, cut with a mark when it is too long.
pub(super) fn cut(name: &str) -> String {
    crate::process::bounded(name.as_bytes(), MAX_NAME, false)
}

#[cfg(test)]
mod tests {
    use super::*;

    /// The three kinds of names that programs have must all read as people wrote them.
    #[test]
    fn rust_cpp_and_c_names_are_readable() {
        assert_eq!(demangle("_ZN4core3fmt5Write9write_fmt17h0123456789abcdefE"), "core::fmt::Write::write_fmt");
        assert_eq!(demangle("_RNvCskwGfYPst2Cb_3foo3bar"), "foo::bar");
        assert_eq!(demangle("_ZN5Cache3putEiPKc"), "Cache::put(int, char const*)");
        assert_eq!(demangle("zmalloc_usable"), "zmalloc_usable");
        assert_eq!(demangle("_Znot_mangled"), "_Znot_mangled");
        assert_eq!(demangle("<script>\x1b[2J"), "<script>\x1b[2J", "cleaning is the output's business");
    }

    /// Each parameter has the one before it twice as template argument, so the text doubles with every step: about 2^34
    /// bytes in the end.
    #[test]
    fn a_name_that_stands_for_gigabytes_is_cut() {
        let mut name = String::from("_Z1f1AIiiE");
        for digit in "0123456789ABCDEFGHIJKLMNOPQRSTUV".chars() {
            name.push_str(&format!("S_IS{digit}_S{digit}_E"));
        }
        let started = std::time::Instant::now();
        let text = demangle(&name);
        assert!(text.starts_with("f(A<int, int>, A<A<int, int>, A<int, int> >") && text.ends_with(MARK), "{text}");
        assert!(text.len() <= MAX_NAME, "{}", text.len());
        assert!(started.elapsed().as_secs() < 5, "{:?}", started.elapsed());

        let mut out = Bounded::default();
        let endless = (0..1_000_000).try_for_each(|_| out.write_str("é<"));
        let text = out.finish(endless).expect("cut");
        assert!(text.len() <= MAX_NAME && text.len() > MAX_NAME - 4 && text.ends_with(MARK));
    }

    /// A name of a megabyte is shown in part, with a mark.
    #[test]
    fn a_very_long_name_is_cut_with_a_mark() {
        let text = demangle(&format!("_ZN{}", "a".repeat(1 << 20)));
        assert_eq!(text.len(), MAX_NAME);
        assert!(text.starts_with("_ZNaaa") && text.ends_with("a..."));
    }
}
