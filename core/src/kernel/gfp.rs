//! Names of allocation flags. Which bit is which differs between kernels: the running one is asked.

use std::fmt::Write as _;

/// Where tracefs may be mounted.
const FORMATS: [&str; 2] =
    ["/sys/kernel/tracing/events/kmem/kmalloc/format", "/sys/kernel/debug/tracing/events/kmem/kmalloc/format"];

/// Flags that are usually given together, by name; the larger first.
const TOGETHER: [(&str, &[&str]); 4] = [
    ("GFP_KERNEL", &["__GFP_DIRECT_RECLAIM", "__GFP_KSWAPD_RECLAIM", "__GFP_IO", "__GFP_FS"]),
    ("GFP_NOFS", &["__GFP_DIRECT_RECLAIM", "__GFP_KSWAPD_RECLAIM", "__GFP_IO"]),
    ("GFP_NOIO", &["__GFP_DIRECT_RECLAIM", "__GFP_KSWAPD_RECLAIM"]),
    ("GFP_ATOMIC", &["__GFP_HIGH", "__GFP_KSWAPD_RECLAIM"]),
];

/// Names and bits of this kernel's flags.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct GfpFlags {
    /// Names of sets of bits, those with more bits first.
    names: Vec<(String, u64)>,
}

impl GfpFlags {
    /// Asks the kernel: its type information (6.10 and newer), else the description of a tracepoint, where tracefs is
    /// mounted. No flag has a name when neither tells.
    pub fn read() -> Self {
        let mut flags = memleak_probes::kernel::gfp_flags();
        if flags.is_empty() {
            let text = FORMATS.iter().find_map(|path| std::fs::read_to_string(path).ok());
            flags = text.map(|text| parse_format(&text)).unwrap_or_default();
        }
        Self::of(flags)
    }

    fn of(mut names: Vec<(String, u64)>) -> Self {
        let bit = |names: &[(String, u64)], name: &str| names.iter().find(|(n, _)| n == name).map(|(_, bits)| *bits);
        for (name, parts) in TOGETHER {
            let bits: Option<u64> = parts.iter().map(|part| bit(&names, part)).try_fold(0, |sum, b| Some(sum | b?));
            if let (Some(bits), None) = (bits, bit(&names, name)) {
                names.push((name.to_owned(), bits));
            }
        }
        names.retain(|(_, bits)| *bits != 0);
        names.sort_by_key(|(name, bits)| (std::cmp::Reverse(bits.count_ones()), name.clone()));
        GfpFlags { names }
    }

    /// The bits of a flag by name, or of a number such as `0xcc0`; `None` when it is not known.
    pub fn bits(&self, name: &str) -> Option<u64> {
        let named = self.names.iter().find(|(n, _)| n == name).map(|(_, bits)| *bits);
        named.or_else(|| u64::from_str_radix(name.strip_prefix("0x")?, 16).ok())
    }

    /// Names of flags, for messages.
    pub fn known(&self) -> Vec<&str> {
        self.names.iter().map(|(name, _)| name.as_str()).collect()
    }

    /// The flags as text.
    pub fn describe(&self, flags: u64) -> String {
        let mut rest = flags;
        let mut text = String::new();
        for (name, bits) in &self.names {
            if rest & bits == *bits {
                rest &= !bits;
                let _ = write!(text, "{}{name}", if text.is_empty() { "" } else { "|" });
            }
        }
        if rest != 0 || text.is_empty() {
            let _ = write!(text, "{}0x{rest:x}", if text.is_empty() { "" } else { "|" });
        }
        text
    }
}

/// Names in the text of a tracepoint's description: `{( unsigned long)(...0x400u|0x800u...), "GFP_KERNEL"}`.
fn parse_format(text: &str) -> Vec<(String, u64)> {
    let mut found = Vec::new();
    for part in text.split('{').skip(1) {
        let Some((value, rest)) = part.split_once('"') else { continue };
        let Some((name, _)) = rest.split_once('"') else { continue };
        if !name.contains("GFP_") {
            continue;
        }
        found.push((name.to_owned(), or_of_numbers(value)));
    }
    found
}

/// All numbers in the text, or-ed: casts and brackets aside, that is what the text is.
fn or_of_numbers(text: &str) -> u64 {
    text.split(|c: char| !c.is_ascii_alphanumeric())
        .filter_map(|word| {
            u64::from_str_radix(word.strip_prefix("0x")?.trim_end_matches(['u', 'U', 'l', 'L']), 16).ok()
        })
        .fold(0, |sum, n| sum | n)
}

#[cfg(test)]
mod tests {
    use super::*;

    /// What 5.10 writes into the description of kmem:kmalloc.
    #[test]
    fn flags_are_read_from_a_tracepoints_description() {
        let text = r#"print fmt: "gfp_flags=%s", (REC->gfp_flags) ? __print_flags(REC->gfp_flags, "|",
            {(unsigned long)((( gfp_t)(0x400u|0x800u)) | (( gfp_t)0x40u) | (( gfp_t)0x80u)), "GFP_KERNEL"},
            {(unsigned long)(( gfp_t)0x100u), "__GFP_ZERO"}) : "none""#;
        let flags = GfpFlags::of(parse_format(text));
        assert_eq!(flags.describe(0xdc0), "GFP_KERNEL|__GFP_ZERO");
        assert_eq!(flags.describe(0x1040), "0x1040");
        assert_eq!(flags.bits("__GFP_ZERO"), Some(0x100));
        assert_eq!(flags.bits("0x10"), Some(0x10));
        assert_eq!(flags.bits("GFP_NONSENSE"), None);
    }

    /// Newer kernels name single bits in their type information.
    #[test]
    fn usual_combinations_have_their_names() {
        let bits = ["__GFP_DIRECT_RECLAIM", "__GFP_KSWAPD_RECLAIM", "__GFP_IO", "__GFP_FS", "__GFP_HIGH"];
        let flags = GfpFlags::of(bits.iter().enumerate().map(|(i, n)| ((*n).to_owned(), 1 << i)).collect());
        assert_eq!(flags.describe(0b1111), "GFP_KERNEL");
        assert_eq!(flags.describe(0b10010), "GFP_ATOMIC");
        assert_eq!(flags.describe(0), "0x0");
    }
}
