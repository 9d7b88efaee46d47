//! One line of the text output of bcc's `memleak`, taken apart.
//!
//! There are two programs of that name: the python tool, which prints frames as `function+0x1a [module]` (newer ones with
//! the address in front), and the one of libbpf-tools, which numbers them: `0 [<address>] function+0x1a [module]`. Both
//! are read, whatever mixture of spaces and tabs they are indented by. Nothing here knows what came before a line; that
//! is the business of [`super::assemble`]. Names are hostile: they are kept as they are, and whoever prints them
//! escapes them.

use crate::symbolize::Frame;

/// Module of the kernel's own code, as the python tool prints it.
pub(super) const KERNEL: &str = "[kernel]";
/// What the python tool prints in place of the frames of a stack that its table had no room for.
const LOST: &str = "stack information lost";

/// What a line says.
#[derive(Clone, Debug, PartialEq)]
pub(super) enum Line {
    /// Whom the tool has attached to; `None` is the kernel.
    Attached(Option<u32>),
    /// The head of an interval.
    Interval {
        /// Time of day, seconds since midnight.
        day_s: u32,
        /// The number in the heading: how many stacks are shown, or can be.
        top: usize,
    },
    /// The head of a stack.
    Stack {
        /// Outstanding bytes.
        bytes: u64,
        /// Outstanding blocks.
        count: u64,
    },
    /// A frame of the stack; the innermost one comes first.
    Frame(Box<Frame>),
    /// The stack has no frames because the tool has lost them.
    Lost,
    /// One outstanding block (`-a`).
    Block,
    /// Nothing that matters: an empty line, or what the tool says when it starts and ends.
    Nothing,
}

impl Line {
    /// Takes a line, without its line break, apart.
    ///
    /// # Errors
    /// What was expected, when it is none of the lines above.
    pub(super) fn parse(line: &str) -> Result<Line, &'static str> {
        let text = line.trim();
        if text.is_empty() {
            return Ok(Line::Nothing);
        }
        if let Some(rest) = text.strip_prefix("Attaching to ") {
            return attached(rest).map(Line::Attached).ok_or("a process id is expected after `Attaching to pid`");
        }
        if let Some((rest, "stacks with outstanding allocations:")) =
            text.split_once(" Top ").and_then(|(time, rest)| Some((time, rest.split_once(' ')?.1)))
        {
            return interval(rest, text).ok_or("a time such as [11:16:33] and a number of stacks are expected");
        }
        if text.ends_with(" from stack") {
            return stack(text).ok_or("`N bytes in M allocations from stack` is expected");
        }
        if let Some(rest) = text.strip_prefix("addr = ") {
            return block(rest).ok_or("`addr = ADDRESS size = N` is expected");
        }
        if text == LOST {
            return Ok(Line::Lost);
        }
        // Frames are indented; what the tools say of themselves is not.
        match line.starts_with([' ', '\t']) {
            true => frame(text).map(|f| Line::Frame(Box::new(f))).ok_or("it is no frame of a call stack"),
            false if is_chatter(text) => Ok(Line::Nothing),
            false => Err("it is no line of memleak's output"),
        }
    }
}

fn attached(rest: &str) -> Option<Option<u32>> {
    if rest.starts_with("kernel allocators") {
        return Some(None);
    }
    let pid = rest.strip_prefix("pid ")?;
    Some(Some(pid.split(',').next()?.trim().parse().ok()?))
}

fn interval(time: &str, text: &str) -> Option<Line> {
    let mut parts = time.strip_prefix('[')?.strip_suffix(']')?.split(':');
    let mut part = |below: u32| parts.next()?.parse().ok().filter(|n: &u32| *n < below);
    // A minute can have 61 seconds.
    let (hours, minutes, seconds) = (part(24)?, part(60)?, part(61)?);
    let top = text.split_once(" Top ")?.1.split(' ').next()?.parse().ok()?;
    parts.next().is_none().then_some(Line::Interval { day_s: hours * 3600 + minutes * 60 + seconds, top })
}

fn stack(text: &str) -> Option<Line> {
    let (bytes, rest) = text.split_once(" bytes in ")?;
    let count = rest.strip_suffix(" allocations from stack")?;
    Some(Line::Stack { bytes: bytes.parse().ok()?, count: count.parse().ok()? })
}

fn block(rest: &str) -> Option<Line> {
    let (address, size) = rest.split_once(" size = ")?;
    u64::from_str_radix(address.trim_start_matches("0x"), 16).ok()?;
    size.parse::<u64>().ok()?;
    Some(Line::Block)
}

/// What the tools say besides their tables.
fn is_chatter(text: &str) -> bool {
    ["Executing ", "Tracing ", "using ", "tracing ", "WARNING: ", "warning: ", "libbpf: ", "done"]
        .iter()
        .any(|start| text.starts_with(start))
}

fn frame(text: &str) -> Option<Frame> {
    // libbpf-tools: `0 [<000055c29ba05231>] symbol`; python: `0x000055c29ba05231\tsymbol`, or the symbol alone.
    let numbered = text.split_once(" [<").filter(|(number, _)| number.bytes().all(|b| b.is_ascii_digit()));
    let addressed = match numbered {
        Some((_, rest)) => Some(rest.split_once(">]")?),
        None => text.strip_prefix("0x").and_then(|rest| rest.split_once(['\t', ' '])),
    };
    let (address, text) = match addressed {
        Some((address, symbol)) => (Some(u64::from_str_radix(address, 16).ok()?), symbol.trim_start()),
        None => (None, text),
    };
    let symbol = symbol(text).or_else(|| nameless(text, address.is_some()))?;
    let address = address.unwrap_or(0);
    let reason = symbol.function.is_none().then(|| "the log has no name for it".to_owned());
    // Only the tool knew where the module lay: without a function, the address is all there is.
    let offset = if symbol.function.is_some() { symbol.offset } else { address };
    Some(Frame { address, offset, reason, ..symbol })
}

/// `function+0x1a`, then nothing, ` [module]` or ` file:line`.
fn symbol(text: &str) -> Option<Frame> {
    // The first one that ends like an offset: names and paths may hold the same characters.
    let (name, offset, rest) = text.match_indices("+0x").find_map(|(i, mark)| {
        let digits = &text[i + mark.len()..];
        let end = digits.find(|c: char| !c.is_ascii_hexdigit()).unwrap_or(digits.len());
        let (digits, rest) = digits.split_at(end);
        let ends = rest.is_empty() || rest.starts_with(' ');
        Some((&text[..i], u64::from_str_radix(digits, 16).ok().filter(|_| ends && i > 0)?, rest.trim()))
    })?;
    let mut frame = Frame { offset, ..Frame::default() };
    if name != "[unknown]" {
        frame.function = Some(name.to_owned());
    }
    if let Some(name) = module(rest) {
        frame.module = Some(name);
    } else if let Some((file, line)) = rest.rsplit_once(':') {
        frame.file = Some(file.to_owned());
        frame.line = Some(line.parse().ok()?);
    } else if !rest.is_empty() {
        return None;
    }
    Some(frame)
}

/// A place without a name: `[module]`, `[unknown] [module]`, `[unknown]` or `<null sym>`.
fn nameless(text: &str, has_address: bool) -> Option<Frame> {
    let rest = match text.strip_prefix("[unknown]") {
        Some(rest) => rest.trim_start(),
        // A module alone needs an address beside it, or any text in brackets would be a frame.
        None if has_address && text == "<null sym>" => "",
        None if has_address => text,
        None => return None,
    };
    match module(rest) {
        None if !rest.is_empty() => None,
        module => Some(Frame { module, ..Frame::default() }),
    }
}

/// The name in `[module]`.
fn module(text: &str) -> Option<String> {
    let name = text.strip_prefix('[')?.strip_suffix(']')?;
    match name {
        "" => None,
        "kernel" => Some(KERNEL.to_owned()),
        // Memory that the kernel names is in brackets itself.
        "vdso" | "heap" | "stack" | "vsyscall" => Some(format!("[{name}]")),
        name => Some(name.to_owned()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn parsed_frame(line: &str) -> Frame {
        match Line::parse(line) {
            Ok(Line::Frame(frame)) => *frame,
            other => panic!("{line:?}: {other:?}"),
        }
    }

    /// Function, offset, module and address of a frame as each tool prints it.
    #[test]
    fn frames_of_both_tools_are_read() {
        for (line, address, function, offset, module) in [
            (
                "\t0 [<000055c29ba05231>] cache_put+0x68 [/usr/local/bin/order-service]",
                0x55c2_9ba0_5231,
                Some("cache_put"),
                0x68,
                Some("/usr/local/bin/order-service"),
            ),
            (
                "\t2 [<00007fd65cc9824a>] [/usr/lib/libc.so.6]",
                0x7fd6_5cc9_824a,
                None,
                0x7fd6_5cc9_824a,
                Some("/usr/lib/libc.so.6"),
            ),
            (
                "\t0 [<ffffffff8161f78b>] __alloc_frozen_pages_noprof+0x26b",
                0xffff_ffff_8161_f78b,
                Some("__alloc_frozen_pages_noprof"),
                0x26b,
                None,
            ),
            ("\t3 [<0000000000000000>] <null sym>", 0, None, 0, None),
            ("\t\t main+0x6d [allocs]", 0, Some("main"), 0x6d, Some("allocs")),
            ("                 main+0x6d [allocs]", 0, Some("main"), 0x6d, Some("allocs")),
            ("\t\t0x000055c29ba05231\tmain+0x6d [allocs]", 0x55c2_9ba0_5231, Some("main"), 0x6d, Some("allocs")),
            (
                "\t\t0xffffffff8161f78b\tkmem_cache_alloc+0x1a [kernel]",
                0xffff_ffff_8161_f78b,
                Some("kmem_cache_alloc"),
                0x1a,
                Some(KERNEL),
            ),
            ("\t\t[unknown] [libfoo.so (deleted)]", 0, None, 0, Some("libfoo.so (deleted)")),
            ("\t\t[unknown]", 0, None, 0, None),
            (
                "\t\toperator new(unsigned long)+0x1c [libstdc++.so.6]",
                0,
                Some("operator new(unsigned long)"),
                0x1c,
                Some("libstdc++.so.6"),
            ),
            ("\t\ta+0xg+0x10 [/opt/b+0x1/c]", 0, Some("a+0xg"), 0x10, Some("/opt/b+0x1/c")),
        ] {
            let frame = parsed_frame(line);
            assert_eq!(
                (frame.address, frame.function.as_deref(), frame.offset, frame.module.as_deref()),
                (address, function, offset, module),
                "{line:?}"
            );
            assert_eq!(frame.reason.is_some(), function.is_none(), "{line:?}");
        }
        let frame = parsed_frame("\t0 [<000055c29ba05231>] order_new+0x1a src/order.c:17");
        assert_eq!((frame.file.as_deref(), frame.line), (Some("src/order.c"), Some(17)));
    }

    /// Heads of intervals, stacks and blocks, padded or not.
    #[test]
    fn heads_are_read() {
        for (line, expected) in [
            ("Attaching to pid 16851, Ctrl+C to quit.", Line::Attached(Some(16851))),
            ("Attaching to kernel allocators, Ctrl+C to quit.", Line::Attached(None)),
            ("[8:35:6] Top 3 stacks with outstanding allocations:", Line::Interval { day_s: 30_906, top: 3 }),
            ("[23:59:60] Top 10 stacks with outstanding allocations:", Line::Interval { day_s: 86_400, top: 10 }),
            ("19504 bytes in 64 allocations from stack", Line::Stack { bytes: 19_504, count: 64 }),
            ("        80 bytes in 5 allocations from stack", Line::Stack { bytes: 80, count: 5 }),
            ("\taddr = 0x55c2be8dd450 size = 272", Line::Block),
            ("\taddr = 948cd0 size = 16", Line::Block),
            ("\t\tstack information lost", Line::Lost),
            ("", Line::Nothing),
            ("Executing './allocs' and tracing the resulting process.", Line::Nothing),
        ] {
            assert_eq!(Line::parse(line), Ok(expected), "{line:?}");
        }
    }

    /// What is none of these must be refused, or a damaged log would be read as a sound one.
    #[test]
    fn damaged_lines_are_refused() {
        for line in [
            "hello",
            "\thello",
            "[8:35] Top 3 stacks with outstanding allocations:",
            "[25:00:00] Top 3 stacks with outstanding allocations:",
            "[8:35:6:7] Top 3 stacks with outstanding allocations:",
            "[8:35:6] Top many stacks with outstanding allocations:",
            "-5 bytes in 5 allocations from stack",
            "99999999999999999999 bytes in 5 allocations from stack",
            "\taddr = xyz size = 16",
            "Attaching to pid me",
            "\t0 [<zz>] main+0x1 [a]",
            "\t\tmain+0x [a]",
            "\t\tmain+0x1 [a",
            "\t\t+0x1 [a]",
        ] {
            assert!(Line::parse(line).is_err(), "{line:?}: {:?}", Line::parse(line));
        }
    }
}
