package engine

import (
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"os"
	"syscall"
	"testing"

	"github.com/fleetquota/fleetquota/quota"
)

func TestErrorClasses(t *testing.T) {
	for text, want := range map[string]error{
		"LOADING Redis is loading the dataset in memory":                                                               quota.ErrUnavailable,
		"CLUSTERDOWN Hash slot not served":                                                                             quota.ErrUnavailable,
		"TRYAGAIN Multiple keys request during rehashing of slot":                                                      quota.ErrUnavailable,
		"MASTERDOWN Link with MASTER is down and replica-serve-stale-data is set to 'no'.":                             quota.ErrUnavailable,
		"READONLY You can't write against a read only replica. script: abc, on @user_script:1.":                        quota.ErrUnavailable,
		"NOREPLICAS Not enough good replicas to write.":                                                                quota.ErrUnavailable,
		"OOM command not allowed when used memory > 'maxmemory'. script: abc, on @user_script:1.":                      quota.ErrUnavailable,
		"MISCONF Redis is configured to save RDB snapshots":                                                            quota.ErrUnavailable,
		"BUSY Redis is busy running a script.":                                                                         quota.ErrUnavailable,
		"ERR max number of clients reached":                                                                            quota.ErrUnavailable,
		"MOVED 1 127.0.0.1:1":                                                                                          quota.ErrUnavailable,
		"ASK 1 127.0.0.1:1":                                                                                            quota.ErrUnavailable,
		"ERR Error running script (call to f_0): @user_script:1: -OOM command not allowed":                             quota.ErrUnavailable,
		"ERR Error running script (call to f_0): @user_script:1: -READONLY You can't write against a read only slave.": quota.ErrUnavailable,
		"ERR Error running script (call to f_0): @user_script:1: attempt to index":                                     quota.ErrMisconfigured,
		"NOAUTH Authentication required.":                                                                              quota.ErrMisconfigured,
		"WRONGPASS invalid username-password pair or user is disabled.":                                                quota.ErrMisconfigured,
		"NOPERM this user has no permissions to run the 'evalsha' command":                                             quota.ErrMisconfigured,
		"WRONGTYPE Operation against a key holding the wrong kind of value":                                            quota.ErrMisconfigured,
		"CROSSSLOT Keys in request don't hash to the same slot":                                                        quota.ErrMisconfigured,
		"ERR unknown command 'EVALSHA'":                                                                                quota.ErrMisconfigured,
		"ERR user_script:1: boom":                                                                                      quota.ErrMisconfigured,
		"FLEETQUOTA the key holds no state of this rule and layout":                                                    quota.ErrMisconfigured,
		"": quota.ErrMisconfigured,
	} {
		cause := errors.New(text)
		if err := ReplyError(cause); !errors.Is(err, want) || !errors.Is(err, cause) {
			t.Errorf("ReplyError(%q): got %v, want %v around the cause", text, err, want)
		}
	}
	for _, test := range []struct{ cause, want error }{
		{&net.OpError{Op: "dial", Err: syscall.ECONNREFUSED}, quota.ErrUnavailable},
		{fmt.Errorf("redis: %w", &net.OpError{Op: "dial", Err: os.ErrDeadlineExceeded}), quota.ErrUnavailable},
		{&net.OpError{Op: "read", Err: syscall.ECONNRESET}, quota.ErrIndeterminate},
		{&net.OpError{Op: "write", Err: syscall.EPIPE}, quota.ErrIndeterminate},
		{&net.OpError{Op: "read", Err: os.ErrDeadlineExceeded}, quota.ErrIndeterminate},
		{io.EOF, quota.ErrIndeterminate}, {io.ErrUnexpectedEOF, quota.ErrIndeterminate},
		{context.DeadlineExceeded, quota.ErrIndeterminate}, {context.Canceled, quota.ErrIndeterminate},
		{errors.New("what is this"), quota.ErrIndeterminate},
	} {
		err := TransportError(test.cause)
		if !errors.Is(err, test.want) || !errors.Is(err, test.cause) || errors.Is(err, quota.ErrUnavailable) && errors.Is(err, quota.ErrIndeterminate) {
			t.Errorf("TransportError(%v): got %v, want only %v around the cause", test.cause, err, test.want)
		}
	}
	for text, want := range map[string]bool{"NOSCRIPT No matching script. Please use EVAL.": true, "ERR NOSCRIPT": false} {
		if got := IsNoScript(errors.New(text)); got != want {
			t.Errorf("IsNoScript(%q): got %v, want %v", text, got, want)
		}
	}
}
