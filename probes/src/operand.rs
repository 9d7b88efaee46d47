//! Where a probe finds a value, as the kernel side is told.

use crate::types::{memleak_operand, memleak_operand_kind as kinds};

/// A value that a probe reads. Registers are numbered as the processor's instructions do.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub(crate) enum Operand {
    /// There is none.
    None,
    /// A whole register.
    Register(u8),
    /// The low bytes of a register.
    Part {
        /// Its number.
        number: u8,
        /// Width: 1, 2, 4 or 8.
        bytes: u8,
        /// The sign is extended.
        signed: bool,
    },
    /// Known beforehand.
    Constant(u64),
    /// Memory that a register plus an offset points at.
    Memory {
        /// Number of the register.
        number: u8,
        /// Added to it.
        offset: i64,
        /// Width: 1, 2, 4 or 8.
        bytes: u8,
        /// The sign is extended.
        signed: bool,
    },
}

impl Operand {
    /// The kernel side's form.
    pub(crate) fn encode(self) -> memleak_operand {
        let (kind, number, value, bytes, signed) = match self {
            Operand::None => (kinds::OPERAND_NONE, 0, 0, 8, false),
            Operand::Register(number) => (kinds::OPERAND_REGISTER, number, 0, 8, false),
            Operand::Part { number, bytes, signed } => (kinds::OPERAND_REGISTER, number, 0, bytes, signed),
            Operand::Constant(value) => (kinds::OPERAND_CONSTANT, 0, value, 8, false),
            Operand::Memory { number, offset, bytes, signed } => {
                (kinds::OPERAND_MEMORY, number, offset.cast_unsigned(), bytes, signed)
            }
        };
        let last_byte = bytes.saturating_sub(1);
        memleak_operand { kind: kind.0 as u8, number, last_byte, is_signed: signed.into(), pad: 0, value }
    }
}
