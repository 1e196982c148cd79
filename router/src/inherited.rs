//! Open files that the launcher hands over by number.
#![allow(unsafe_code)]

use std::os::fd::{FromRawFd, OwnedFd, RawFd};

/// Takes over an inherited file. Each number may be taken once, and only numbers that the caller was told.
pub fn take(number: RawFd) -> std::io::Result<OwnedFd> {
    // Numbers below 3 belong to the standard streams, which the runtime owns.
    if number < 3 || nix::fcntl::fcntl(borrowed(number), nix::fcntl::FcntlArg::F_GETFD).is_err() {
        let message = format!("{number} is not the number of an inherited file");
        return Err(std::io::Error::new(
            std::io::ErrorKind::InvalidInput,
            message,
        ));
    }
    // SAFETY: the number is open, and the launcher gave it to this process to own.
    Ok(unsafe { OwnedFd::from_raw_fd(number) })
}

fn borrowed<'a>(number: RawFd) -> std::os::fd::BorrowedFd<'a> {
    // SAFETY: only used to ask whether the number is open.
    unsafe { std::os::fd::BorrowedFd::borrow_raw(number) }
}
