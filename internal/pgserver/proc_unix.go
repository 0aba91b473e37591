//go:build unix && !linux

package pgserver

import "syscall"

const immediateShutdown = syscall.SIGQUIT

type sysProcAttr = syscall.SysProcAttr

// attributes runs a process as a user, unless uid is negative.
func attributes(uid, gid int) *sysProcAttr {
	if uid < 0 {
		return nil
	}
	return &sysProcAttr{Credential: &syscall.Credential{Uid: uint32(uid), Gid: uint32(gid)}}
}
