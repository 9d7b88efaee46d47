//! Lua patterns with bounded time.
//!
//! Lua's own matcher runs in C, where no instruction hook fires, and a pattern such as `(".-"):rep(20)` makes it
//! backtrack for years. This one follows the reference manual (section 6.4.1) and charges every step to the rule's
//! budget.

/// Most captures of one pattern, as in Lua.
const MAX_CAPTURES: usize = 32;
/// Most nested calls of [`Matcher::run`], as in Lua.
const MAX_DEPTH: u32 = 200;

/// Why a pattern could not be matched.
pub(super) enum Failure {
    /// The pattern is malformed.
    Malformed(&'static str),
    /// The budget is used up.
    Budget(mlua::Error),
}

impl From<Failure> for mlua::Error {
    fn from(failure: Failure) -> Self {
        match failure {
            Failure::Malformed(why) => mlua::Error::runtime(why),
            Failure::Budget(error) => error,
        }
    }
}

/// What a capture holds.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Capture {
    /// Still open.
    Open(usize),
    /// A position capture `()`, zero-based.
    Position(usize),
    /// Start and end of the text.
    Text(usize, usize),
}

/// One pattern being matched against one subject.
pub(super) struct Matcher<'a, F> {
    subject: &'a [u8],
    pattern: &'a [u8],
    captures: [Capture; MAX_CAPTURES],
    level: usize,
    depth: u32,
    charge: F,
}

impl<'a, F: Fn() -> mlua::Result<()>> Matcher<'a, F> {
    /// `charge` is called once per step and ends the match by failing.
    pub(super) fn new(subject: &'a [u8], pattern: &'a [u8], charge: F) -> Self {
        Matcher { subject, pattern, captures: [Capture::Open(0); MAX_CAPTURES], level: 0, depth: 0, charge }
    }

    /// Matches at or after `init`: start and end of the first match. A leading `^` anchors unless `anchor` is false.
    pub(super) fn find(&mut self, init: usize, anchor: bool) -> Result<Option<(usize, usize)>, Failure> {
        let anchored = anchor && self.pattern.first() == Some(&b'^');
        let from = usize::from(anchored);
        let mut start = init;
        while start <= self.subject.len() {
            if let Some(end) = self.at(start, from)? {
                return Ok(Some((start, end)));
            }
            if anchored {
                break;
            }
            start += 1;
        }
        Ok(None)
    }

    /// Matches exactly at `start`: the end of the match. `from` skips a leading `^`.
    pub(super) fn at(&mut self, start: usize, from: usize) -> Result<Option<usize>, Failure> {
        self.level = 0;
        self.depth = 0;
        self.run(start, from)
    }

    /// Captures of the last match; empty when the pattern has none.
    pub(super) fn captures(&self) -> Result<&[Capture], Failure> {
        let captures = &self.captures[..self.level];
        if captures.iter().any(|c| matches!(c, Capture::Open(_))) {
            return Err(Failure::Malformed("unfinished capture"));
        }
        Ok(captures)
    }

    fn step(&self) -> Result<(), Failure> {
        (self.charge)().map_err(Failure::Budget)
    }

    fn run(&mut self, s: usize, p: usize) -> Result<Option<usize>, Failure> {
        self.depth += 1;
        if self.depth > MAX_DEPTH {
            return Err(Failure::Malformed("pattern too complex"));
        }
        let result = self.items(s, p);
        self.depth -= 1;
        result
    }

    /// Matches the pattern from item `p` on.
    fn items(&mut self, mut s: usize, mut p: usize) -> Result<Option<usize>, Failure> {
        loop {
            self.step()?;
            let Some(&item) = self.pattern.get(p) else { return Ok(Some(s)) };
            let next = self.pattern.get(p + 1).copied();
            match (item, next) {
                (b'(', Some(b')')) => return self.open(s, p + 2, Capture::Position(s)),
                (b'(', _) => return self.open(s, p + 1, Capture::Open(s)),
                (b')', _) => return self.close(s, p + 1),
                (b'$', None) => return Ok((s == self.subject.len()).then_some(s)),
                (b'%', Some(b'b')) => match self.balanced(s, p + 2)? {
                    Some(end) => {
                        s = end;
                        p += 4;
                        continue;
                    }
                    None => return Ok(None),
                },
                (b'%', Some(b'f')) => {
                    p += 2;
                    if self.pattern.get(p) != Some(&b'[') {
                        return Err(Failure::Malformed("missing '[' after '%f' in pattern"));
                    }
                    let end = self.class_end(p)?;
                    let before = if s == 0 { 0 } else { self.subject[s - 1] };
                    let here = self.subject.get(s).copied().unwrap_or(0);
                    if self.in_set(before, p, end - 1)? || !self.in_set(here, p, end - 1)? {
                        return Ok(None);
                    }
                    p = end;
                    continue;
                }
                (b'%', Some(digit @ b'0'..=b'9')) => match self.back_reference(s, digit)? {
                    Some(end) => {
                        s = end;
                        p += 2;
                        continue;
                    }
                    None => return Ok(None),
                },
                _ => {}
            }
            let end = self.class_end(p)?;
            match self.pattern.get(end) {
                Some(b'?') => {
                    if self.single(s, p, end)?
                        && let Some(matched) = self.run(s + 1, end + 1)?
                    {
                        return Ok(Some(matched));
                    }
                    p = end + 1;
                }
                Some(b'*') => return self.longest(s, p, end),
                Some(b'+') => return if self.single(s, p, end)? { self.longest(s + 1, p, end) } else { Ok(None) },
                Some(b'-') => return self.shortest(s, p, end),
                _ if self.single(s, p, end)? => {
                    s += 1;
                    p = end;
                }
                _ => return Ok(None),
            }
        }
    }

    /// `*` and `+`: as many as possible, then fewer.
    fn longest(&mut self, s: usize, p: usize, end: usize) -> Result<Option<usize>, Failure> {
        let mut n = 0;
        while self.single(s + n, p, end)? {
            n += 1;
        }
        loop {
            if let Some(matched) = self.run(s + n, end + 1)? {
                return Ok(Some(matched));
            }
            if n == 0 {
                return Ok(None);
            }
            n -= 1;
        }
    }

    /// `-`: as few as possible, then more.
    fn shortest(&mut self, mut s: usize, p: usize, end: usize) -> Result<Option<usize>, Failure> {
        loop {
            if let Some(matched) = self.run(s, end + 1)? {
                return Ok(Some(matched));
            }
            if !self.single(s, p, end)? {
                return Ok(None);
            }
            s += 1;
        }
    }

    fn open(&mut self, s: usize, p: usize, capture: Capture) -> Result<Option<usize>, Failure> {
        if self.level >= MAX_CAPTURES {
            return Err(Failure::Malformed("too many captures"));
        }
        self.captures[self.level] = capture;
        self.level += 1;
        let matched = self.run(s, p)?;
        if matched.is_none() {
            self.level -= 1;
        }
        Ok(matched)
    }

    fn close(&mut self, s: usize, p: usize) -> Result<Option<usize>, Failure> {
        let open = self.captures[..self.level].iter().rposition(|c| matches!(c, Capture::Open(_)));
        let Some(index) = open else { return Err(Failure::Malformed("invalid pattern capture")) };
        let before = self.captures[index];
        if let Capture::Open(start) = before {
            self.captures[index] = Capture::Text(start, s);
        }
        let matched = self.run(s, p)?;
        if matched.is_none() {
            self.captures[index] = before;
        }
        Ok(matched)
    }

    fn back_reference(&mut self, s: usize, digit: u8) -> Result<Option<usize>, Failure> {
        let index = usize::from(digit).checked_sub(usize::from(b'1')).filter(|&i| i < self.level);
        match index.map(|i| self.captures[i]) {
            Some(Capture::Text(from, to)) => {
                // A long text costs more than one step.
                for _ in 0..(to - from) / 16 {
                    self.step()?;
                }
                let text = &self.subject[from..to];
                Ok(self.subject[s..].starts_with(text).then_some(s + text.len()))
            }
            Some(Capture::Position(_)) => Ok(Some(s)),
            _ => Err(Failure::Malformed("invalid capture index in pattern")),
        }
    }

    fn balanced(&mut self, s: usize, p: usize) -> Result<Option<usize>, Failure> {
        let (Some(&open), Some(&close)) = (self.pattern.get(p), self.pattern.get(p + 1)) else {
            return Err(Failure::Malformed("malformed pattern (missing arguments to '%b')"));
        };
        if self.subject.get(s) != Some(&open) {
            return Ok(None);
        }
        let mut depth = 1;
        for i in s + 1..self.subject.len() {
            self.step()?;
            let c = self.subject[i];
            if c == close {
                depth -= 1;
                if depth == 0 {
                    return Ok(Some(i + 1));
                }
            } else if c == open {
                depth += 1;
            }
        }
        Ok(None)
    }

    /// Index after the single-character class that starts at `p`.
    fn class_end(&self, p: usize) -> Result<usize, Failure> {
        match self.pattern[p] {
            b'%' if p + 1 >= self.pattern.len() => Err(Failure::Malformed("malformed pattern (ends with '%')")),
            b'%' => Ok(p + 2),
            b'[' => {
                let mut i = p + 1;
                if self.pattern.get(i) == Some(&b'^') {
                    i += 1;
                }
                // A ']' in first place stands for itself.
                let mut first = true;
                loop {
                    self.step()?;
                    match self.pattern.get(i) {
                        None => return Err(Failure::Malformed("malformed pattern (missing ']')")),
                        Some(b']') if !first => return Ok(i + 1),
                        Some(b'%') => i += 2,
                        Some(_) => i += 1,
                    }
                    first = false;
                }
            }
            _ => Ok(p + 1),
        }
    }

    /// Whether the character at `s` belongs to the class at `p..end`.
    fn single(&self, s: usize, p: usize, end: usize) -> Result<bool, Failure> {
        self.step()?;
        let Some(&c) = self.subject.get(s) else { return Ok(false) };
        match self.pattern[p] {
            b'.' => Ok(true),
            b'%' => Ok(in_class(c, self.pattern[p + 1])),
            b'[' => self.in_set(c, p, end - 1),
            literal => Ok(literal == c),
        }
    }

    /// Whether `c` is in the set between `[` at `p` and `]` at `close`.
    fn in_set(&self, c: u8, p: usize, close: usize) -> Result<bool, Failure> {
        let mut i = p + 1;
        let negated = self.pattern[i] == b'^';
        if negated {
            i += 1;
        }
        while i < close {
            self.step()?;
            let hit = match self.pattern[i] {
                b'%' => {
                    i += 1;
                    in_class(c, self.pattern[i])
                }
                low if self.pattern[i + 1] == b'-' && i + 2 < close => {
                    i += 2;
                    (low..=self.pattern[i]).contains(&c)
                }
                literal => literal == c,
            };
            if hit {
                return Ok(!negated);
            }
            i += 1;
        }
        Ok(negated)
    }
}

/// Whether `c` belongs to the class `%class`; an upper-case letter is the complement, no letter is itself.
fn in_class(c: u8, class: u8) -> bool {
    let hit = match class.to_ascii_lowercase() {
        b'a' => c.is_ascii_alphabetic(),
        b'c' => c.is_ascii_control(),
        b'd' => c.is_ascii_digit(),
        b'g' => c.is_ascii_graphic(),
        b'l' => c.is_ascii_lowercase(),
        b'p' => c.is_ascii_punctuation(),
        // The C locale's white space has the vertical tab, which Rust's does not.
        b's' => c.is_ascii_whitespace() || c == 0x0b,
        b'u' => c.is_ascii_uppercase(),
        b'w' => c.is_ascii_alphanumeric(),
        b'x' => c.is_ascii_hexdigit(),
        // Undocumented since 5.2, but still there.
        b'z' => c == 0,
        _ => return class == c,
    };
    hit != class.is_ascii_uppercase()
}
