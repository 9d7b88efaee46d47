//! Where a probe finds a value, as the kernel side is told.

use crate::types::{memleak_operand, memleak_operand_kind as kinds};

/// A value that a probe reads. Registers are numbered as the processor's instructions do.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub(crate) enum Operand {
    /// There is none.
    None,
    /// A whole register.
    Register(u8),
    /// Known beforehand.
    Constant(u64),
}

impl Operand {
    /// The kernel side's form.
    pub(crate) fn encode(self) -> memleak_operand {
        let (kind, number, value) = match self {
            Operand::None => (kinds::OPERAND_NONE, 0, 0),
            Operand::Register(number) => (kinds::OPERAND_REGISTER, number, 0),
            Operand::Constant(value) => (kinds::OPERAND_CONSTANT, 0, value),
        };
        memleak_operand { kind: kind.0 as u8, number, last_byte: 7, is_signed: 0, pad: 0, value }
    }
}
