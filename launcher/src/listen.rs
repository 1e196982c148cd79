//! Takes the address before anything else is started.

use std::fs;
use std::io::ErrorKind;
use std::net::{SocketAddr, TcpListener, ToSocketAddrs};
use std::path::Path;

use crate::failure::{Code, Failure};

/// Listens on the first address that `hostname` stands for and this machine has.
pub fn bind(hostname: &str, port: u16) -> Result<TcpListener, Failure> {
    let addresses = (hostname, port).to_socket_addrs().into_iter().flatten();
    let mut message =
        format!("--hostname {hostname} is no address of this machine; use 127.0.0.1 or 0.0.0.0");
    for address in addresses {
        match TcpListener::bind(address) {
            Ok(listener) => return Ok(listener),
            Err(error) => {
                message = complaint(address, &error);
                // Another address of the same name would hide that the wanted one is taken.
                if error.kind() == ErrorKind::AddrInUse {
                    break;
                }
            }
        }
    }
    Err(Failure::new(Code::Port, message))
}

fn complaint(address: SocketAddr, error: &std::io::Error) -> String {
    let port = address.port();
    match error.kind() {
        ErrorKind::AddrInUse => {
            let owner = owner(port)
                .map(|owner| format!(" by {owner}"))
                .unwrap_or_default();
            format!("{address} is in use{owner}; choose another with --port, or stop that process")
        }
        ErrorKind::PermissionDenied => {
            format!("{address} needs privileges, being below 1024; use --port 3000 or higher")
        }
        _ => format!("{address} cannot be listened on: {error}; see --hostname and --port"),
    }
}

/// The process that listens on `port`, if its files may be seen.
fn owner(port: u16) -> Option<String> {
    let tables = ["/proc/net/tcp", "/proc/net/tcp6"]
        .map(|path| fs::read_to_string(path).unwrap_or_default());
    let socket = tables
        .iter()
        .flat_map(|table| table.lines())
        .find_map(|line| listening_inode(line, port))?;
    let link = format!("socket:[{socket}]");
    let entries = fs::read_dir("/proc").ok()?.flatten();
    let mut processes = entries.filter(is_process).map(|entry| entry.path());
    let process = processes.find(|path| holds(path, &link))?;
    let name = fs::read_to_string(process.join("comm")).unwrap_or_default();
    Some(format!(
        "process {} ({})",
        process.file_name()?.to_string_lossy(),
        name.trim()
    ))
}

/// `/proc/self` is there as well, and is this process.
fn is_process(entry: &fs::DirEntry) -> bool {
    entry
        .file_name()
        .to_string_lossy()
        .bytes()
        .all(|byte| byte.is_ascii_digit())
}

fn holds(process: &Path, link: &str) -> bool {
    let files = fs::read_dir(process.join("fd"))
        .into_iter()
        .flatten()
        .flatten();
    files
        .filter_map(|file| fs::read_link(file.path()).ok())
        .any(|target| target.as_os_str() == link)
}

/// The inode in a line of `/proc/net/tcp` that listens (state 0A) on the port.
fn listening_inode(line: &str, port: u16) -> Option<&str> {
    let mut fields = line.split_whitespace();
    let (local, state) = (fields.nth(1)?, fields.nth(1)?);
    let (_, own_port) = local.rsplit_once(':')?;
    (state == "0A" && u16::from_str_radix(own_port, 16) == Ok(port))
        .then(|| fields.nth(5))
        .flatten()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_address_in_use_is_named_with_its_owner() {
        let taken = bind("127.0.0.1", 0).expect("a free port");
        let port = taken.local_addr().expect("an address").port();
        let failure = bind("127.0.0.1", port).expect_err("taken");
        assert_eq!(failure.code, Code::Port);
        let own = format!(
            "127.0.0.1:{port} is in use by process {} ",
            std::process::id()
        );
        assert!(failure.message.starts_with(&own), "{failure}");
    }

    #[test]
    fn a_name_that_is_no_address_is_refused() {
        assert_eq!(
            bind("not an address", 0).expect_err("no address").code,
            Code::Port
        );
        assert_eq!(
            bind("203.0.113.7", 0).expect_err("another machine's").code,
            Code::Port
        );
    }
}
