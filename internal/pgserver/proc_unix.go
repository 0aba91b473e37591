//go:build unix && !linux

package pgserver

import "syscall"

const immediateShutdown = syscall.SIGQUIT

// attributes runs a process as a user, unless uid is negative.
func attributes(uid, gid int) *syscall.SysProcAttr {
	if uid < 0 {
		return nil
	}
	return &syscall.SysProcAttr{Credential: &syscall.Credential{Uid: uint32(uid), Gid: uint32(gid)}}
}
