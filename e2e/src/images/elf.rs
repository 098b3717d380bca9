//! Just enough of the ELF format to tell a static program from one that needs a loader.

/// True if the program names an interpreter (`PT_INTERP`), which a scratch image does not have, or is no
/// little-endian ELF64 program at all. Layout: elf(5), `Elf64_Ehdr` and `Elf64_Phdr`.
pub(super) fn needs_loader(program: &[u8]) -> bool {
    const PT_INTERP: u64 = 3;
    fn number(bytes: &[u8], at: usize, width: usize) -> Option<u64> {
        let field = bytes.get(at..at.checked_add(width)?)?;
        Some(field.iter().rev().fold(0, |n, b| n << 8 | u64::from(*b)))
    }
    let interpreter = || {
        if !program.starts_with(b"\x7fELF\x02\x01") {
            return None;
        }
        let table = usize::try_from(number(program, 0x20, 8)?).ok()?;
        let width = usize::try_from(number(program, 0x36, 2)?).ok()?;
        let count = usize::try_from(number(program, 0x38, 2)?).ok()?;
        for i in 0..count {
            if number(program, table.checked_add(i * width)?, 4)? == PT_INTERP {
                return Some(true);
            }
        }
        Some(false)
    };
    interpreter().unwrap_or(true)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_a_whole_program_without_an_interpreter_is_static() {
        let header = |segment: u8| {
            let mut program = b"\x7fELF\x02\x01".to_vec();
            program.resize(64 + 56, 0);
            (program[0x20], program[0x36], program[0x38], program[64]) = (64, 56, 1, segment);
            program
        };
        assert!(!needs_loader(&header(1)));
        assert!(needs_loader(&header(3)));
        assert!(needs_loader(&header(1)[..64]) && needs_loader(b"#!/bin/sh\n"));
    }
}
