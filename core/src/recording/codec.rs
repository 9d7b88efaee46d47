//! Bytes of a blob: numbers of variable length in tagged sections, compressed, with a checksum.
//!
//! A blob is a list of sections: tag, length, contents. A reader skips tags that it does not know and takes missing ones
//! for empty, so that a later version can add a section. What is read may be damaged or hostile: every read is checked
//! against the end, and nothing is allocated by a number that the blob itself names.

use crate::{Error, ErrorKind, Result};

/// Level of compression: the fastest that still halves the size.
const LEVEL: i32 = 1;

/// Bytes that one block of a compressed frame stands for at most, and bytes that it takes at least (RFC 8878).
const MAX_BLOCK: usize = 128 << 10;
const MIN_BLOCK: usize = 4;

/// Appends an unsigned number, seven bits per byte, lowest first.
pub(super) fn put(out: &mut Vec<u8>, mut n: u64) {
    while n >= 0x80 {
        out.push(n as u8 | 0x80);
        n >>= 7;
    }
    out.push(n as u8);
}

/// Appends the wrapping difference of two numbers, small ones of either sign as small numbers.
pub(super) fn put_delta(out: &mut Vec<u8>, old: u64, new: u64) {
    put(out, zigzag(new.wrapping_sub(old)));
}

/// Appends eight bytes.
pub(super) fn put_f64(out: &mut Vec<u8>, n: f64) {
    out.extend_from_slice(&n.to_bits().to_le_bytes());
}

/// Appends a section; nothing when it is empty.
pub(super) fn put_section(out: &mut Vec<u8>, tag: u64, contents: &[u8]) {
    if !contents.is_empty() {
        put(out, tag);
        put(out, contents.len() as u64);
        out.extend_from_slice(contents);
    }
}

/// There are no facts any more.
const NO_FACTS: u64 = 0;
/// The text is as before.
const SAME_TEXT: u64 = 1;
/// The text follows.
const NEW_TEXT: u64 = 2;

/// Appends numbers as differences from those before, and a text unless it is the same; `None` takes all back.
pub(super) fn put_facts(out: &mut Vec<u8>, old: (&[u64], &str), new: Option<(&[u64], &str)>) {
    let Some(new) = new else { return put(out, NO_FACTS) };
    let same = new.1 == old.1;
    put(out, if same { SAME_TEXT } else { NEW_TEXT });
    put(out, new.0.len() as u64);
    new.0.iter().enumerate().for_each(|(i, n)| put_delta(out, old.0.get(i).copied().unwrap_or(0), *n));
    if !same {
        put_text(out, new.1);
    }
}

/// Appends a text with its length.
pub(super) fn put_text(out: &mut Vec<u8>, text: &str) {
    put(out, text.len() as u64);
    out.extend_from_slice(text.as_bytes());
}

fn zigzag(n: u64) -> u64 {
    (n << 1) ^ ((n as i64 >> 63) as u64)
}

fn unzigzag(n: u64) -> u64 {
    (n >> 1) ^ (n & 1).wrapping_neg()
}

/// Damaged contents, in the words of the reader.
pub(super) fn damaged(what: &str) -> Error {
    Error::new(ErrorKind::Io, format!("the recording is damaged: {what}"))
}

/// Reads what the functions above have written.
#[derive(Clone, Copy, Debug, Default)]
pub(super) struct In<'a>(&'a [u8]);

impl<'a> In<'a> {
    pub(super) fn new(bytes: &'a [u8]) -> Self {
        In(bytes)
    }

    pub(super) fn is_empty(&self) -> bool {
        self.0.is_empty()
    }

    /// Bytes left: no list can be longer.
    pub(super) fn left(&self) -> usize {
        self.0.len()
    }

    #[inline]
    pub(super) fn get(&mut self) -> Result<u64> {
        // Most numbers are short.
        match self.0 {
            [a, rest @ ..] if *a < 0x80 => {
                self.0 = rest;
                Ok(u64::from(*a))
            }
            [a, b, rest @ ..] if *b < 0x80 => {
                self.0 = rest;
                Ok(u64::from(*a & 0x7f) | u64::from(*b) << 7)
            }
            _ => self.get_long(),
        }
    }

    fn get_long(&mut self) -> Result<u64> {
        let mut n = 0_u64;
        for (i, byte) in self.0.iter().enumerate().take(10) {
            n |= u64::from(byte & 0x7f) << (7 * i);
            if *byte < 0x80 {
                self.0 = &self.0[i + 1..];
                return Ok(n);
            }
        }
        Err(damaged("a number has no end"))
    }

    /// The number that was written as a difference to `old`.
    #[inline]
    pub(super) fn get_delta(&mut self, old: u64) -> Result<u64> {
        Ok(old.wrapping_add(unzigzag(self.get()?)))
    }

    pub(super) fn get_f64(&mut self) -> Result<f64> {
        let Some((head, rest)) = self.0.split_first_chunk::<8>() else { return Err(damaged("a number is cut off")) };
        self.0 = rest;
        Ok(f64::from_bits(u64::from_le_bytes(*head)))
    }

    /// A length that fits what is left.
    pub(super) fn get_len(&mut self) -> Result<usize> {
        let n = self.get()?;
        usize::try_from(n).ok().filter(|n| *n <= self.0.len()).ok_or_else(|| damaged("a list is cut off"))
    }

    /// Text with its length in front.
    pub(super) fn get_text(&mut self) -> Result<&'a str> {
        let len = self.get_len()?;
        let (text, rest) = self.0.split_at(len);
        self.0 = rest;
        std::str::from_utf8(text).map_err(|_| damaged("a text is none"))
    }

    /// Brings facts up to date; false when there are none any more. Numbers that a later version has appended are
    /// skipped.
    pub(super) fn get_facts(&mut self, numbers: &mut [u64], text: &mut String) -> Result<bool> {
        let kind = self.get()?;
        if kind == NO_FACTS {
            return Ok(false);
        }
        for place in 0..self.get_len()? {
            let number = self.get_delta(numbers.get(place).copied().unwrap_or(0))?;
            if let Some(slot) = numbers.get_mut(place) {
                *slot = number;
            }
        }
        if kind == NEW_TEXT {
            *text = self.get_text()?.to_owned();
        }
        Ok(true)
    }

    /// The next section.
    pub(super) fn section(&mut self) -> Result<Option<(u64, In<'a>)>> {
        if self.0.is_empty() {
            return Ok(None);
        }
        let (tag, len) = (self.get()?, self.get_len()?);
        let (contents, rest) = self.0.split_at(len);
        self.0 = rest;
        Ok(Some((tag, In(contents))))
    }

    /// All sections with tags below `N`, by tag.
    pub(super) fn sections<const N: usize>(mut self) -> Result<[In<'a>; N]> {
        let mut found = [In::default(); N];
        while let Some((tag, contents)) = self.section()? {
            if let Some(slot) = usize::try_from(tag).ok().and_then(|tag| found.get_mut(tag)) {
                *slot = contents;
            }
        }
        Ok(found)
    }
}

/// Compresses blobs; keeps its tables between them.
pub(super) struct Compressor(zstd::bulk::Compressor<'static>);

impl Compressor {
    pub(super) fn new() -> Result<Self> {
        let failed = |e| Error::io("failed to set up compression", e);
        let mut compressor = zstd::bulk::Compressor::new(LEVEL).map_err(failed)?;
        // SQLite does not notice a bit that has flipped in a blob; this does.
        compressor.include_checksum(true).map_err(failed)?;
        Ok(Compressor(compressor))
    }

    pub(super) fn compress(&mut self, bytes: &[u8]) -> Result<Vec<u8>> {
        self.0.compress(bytes).map_err(|e| Error::io("failed to compress a snapshot", e))
    }
}

/// Decompresses blobs.
pub(super) struct Decompressor {
    inner: zstd::bulk::Decompressor<'static>,
    buffer: Vec<u8>,
}

impl Decompressor {
    pub(super) fn new() -> Result<Self> {
        let inner = zstd::bulk::Decompressor::new().map_err(|e| Error::io("failed to set up decompression", e))?;
        Ok(Decompressor { inner, buffer: Vec::new() })
    }

    /// The contents, which may be at most `limit` bytes.
    pub(super) fn decompress(&mut self, blob: &[u8], limit: usize) -> Result<In<'_>> {
        let size = zstd::zstd_safe::get_frame_content_size(blob).ok().flatten();
        let size = size.and_then(|n| usize::try_from(n).ok()).filter(|n| *n <= limit);
        // No room by the frame's own word alone: a short one cannot become large.
        let possible = (blob.len() / MIN_BLOCK + 1).saturating_mul(MAX_BLOCK);
        self.buffer.clear();
        let room = size.filter(|n| *n <= possible && self.buffer.try_reserve(*n).is_ok());
        let Some(size) = room else { return Err(damaged("a snapshot has an impossible size")) };
        match self.inner.decompress_to_buffer(blob, &mut self.buffer) {
            Ok(n) if n == size => Ok(In(&self.buffer)),
            _ => Err(damaged("a snapshot cannot be decompressed or fails its checksum")),
        }
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    proptest! {
        /// What is written is what is read, for every number.
        #[test]
        fn numbers_come_back(numbers in proptest::collection::vec(any::<(u64, u64)>(), 0..50)) {
            let mut out = Vec::new();
            for (old, new) in &numbers {
                put(&mut out, *new);
                put_delta(&mut out, *old, *new);
            }
            let mut input = In::new(&out);
            for (old, new) in &numbers {
                prop_assert_eq!(input.get().unwrap(), *new);
                prop_assert_eq!(input.get_delta(*old).unwrap(), *new);
            }
            prop_assert!(input.is_empty());
        }

        /// Whatever the bytes: an error or a number, never a panic.
        #[test]
        fn damaged_bytes_are_an_error(bytes in proptest::collection::vec(any::<u8>(), 0..200)) {
            let mut input = In::new(&bytes);
            while !input.is_empty() && input.get().is_ok() {}
            let _ = In::new(&bytes).sections::<4>();
            prop_assert!(Decompressor::new().unwrap().decompress(&bytes, 1000).is_err());
        }
    }

    /// One flipped bit anywhere in a compressed blob must be noticed.
    #[test]
    fn every_flipped_bit_is_noticed() {
        let contents: Vec<u8> = (0..500_u32).map(|i| (i * i) as u8).collect();
        let blob = Compressor::new().unwrap().compress(&contents).unwrap();
        let mut decompressor = Decompressor::new().unwrap();
        assert_eq!(decompressor.decompress(&blob, 500).unwrap().0, contents);
        assert!(decompressor.decompress(&blob, 499).is_err());
        let mut unnoticed = 0;
        for bit in 0..blob.len() * 8 {
            let mut flipped = blob.clone();
            flipped[bit / 8] ^= 1 << (bit % 8);
            unnoticed += usize::from(decompressor.decompress(&flipped, 5000).is_ok_and(|r| r.0 != contents));
        }
        assert_eq!(unnoticed, 0);
    }

    /// A few bytes that promise a gigabyte get no room for it.
    #[test]
    fn a_promise_of_many_bytes_costs_no_memory() {
        // Magic number, a descriptor with four bytes for the size, and the start of a block.
        let blob = [&[0x28, 0xb5, 0x2f, 0xfd, 0xa0][..], &(1_u32 << 30).to_le_bytes(), &[1, 0, 0]].concat();
        assert_eq!(zstd::zstd_safe::get_frame_content_size(&blob).unwrap(), Some(1 << 30));
        let mut decompressor = Decompressor::new().unwrap();
        assert!(decompressor.decompress(&blob, 1 << 30).is_err());
        assert!(decompressor.buffer.capacity() < 1 << 20);
        // What compresses best still comes back.
        let zeros = vec![0; 64 << 20];
        let blob = Compressor::new().unwrap().compress(&zeros).unwrap();
        assert_eq!(decompressor.decompress(&blob, 1 << 30).unwrap().left(), zeros.len());
    }

    /// Sections that a reader does not know are skipped, missing ones are empty.
    #[test]
    fn unknown_sections_are_skipped() {
        let mut out = Vec::new();
        put_section(&mut out, 1, b"one");
        put_section(&mut out, 77, b"later");
        put_section(&mut out, 0, b"zero");
        let [zero, one, two] = In::new(&out).sections::<3>().unwrap();
        assert_eq!((zero.0, one.0, two.0), (&b"zero"[..], &b"one"[..], &b""[..]));
    }
}
