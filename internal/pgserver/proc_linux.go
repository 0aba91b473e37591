package pgserver

import "syscall"

// immediateShutdown ends the server as a crash does, without leaving its shared memory behind.
const immediateShutdown = syscall.SIGQUIT

// attributes runs a process as a user, unless uid is negative. The kernel ends the server if the process that started it
// dies without cleaning up.
func attributes(uid, gid int) *syscall.SysProcAttr {
	a := &syscall.SysProcAttr{Pdeathsig: immediateShutdown}
	if uid >= 0 {
		a.Credential = &syscall.Credential{Uid: uint32(uid), Gid: uint32(gid)}
	}
	return a
}
