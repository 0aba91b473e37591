package engine

import (
	"context"
	"crypto/tls"
	"crypto/x509"
	"errors"
	"fmt"
	"io"
	"net"
	"os"
	"strings"
	"syscall"
	"testing"

	"github.com/fleetquota/fleetquota/quota"
	"github.com/fleetquota/fleetquota/quota/driver"
)

// TestErrorReplies: the class of each reply, and whether the call that got it was charged. The comments name a
// public source that shows the texts below it.
func TestErrorReplies(t *testing.T) {
	const (
		unavailable = "store unavailable"
		forbidden   = "misconfigured"
		unknown     = "outcome unknown"
		both        = "outcome unknown, misconfigured"
		crossSlot   = "keys in different slots"
	)
	for _, test := range []struct{ class, text string }{
		// Redis: redis/redis, src/server.c (createSharedObjects), src/networking.c, src/script.c, src/cluster.c.
		{unavailable, "LOADING Redis is loading the dataset in memory"},
		{unavailable, "BUSY Redis is busy running a script. You can only call SCRIPT KILL or SHUTDOWN NOSAVE."},
		{unavailable, "MASTERDOWN Link with MASTER is down and replica-serve-stale-data is set to 'no'."},
		{unavailable, "MISCONF Redis is configured to save RDB snapshots, but it's currently unable to persist to disk."},
		{unavailable, "READONLY You can't write against a read only replica. script: abc, on @user_script:1."},
		{unavailable, "OOM command not allowed when used memory > 'maxmemory'. script: abc, on @user_script:1."},
		{unavailable, "NOREPLICAS Not enough good replicas to write."},
		{unavailable, "NOSCRIPT No matching script. Please use EVAL."},
		{unavailable, "ERR max number of clients reached"},
		{unavailable, "max number of clients + cluster connections reached"},
		{unavailable, "DENIED Redis is running in protected mode because protected mode is enabled"},
		{unavailable, "NOPROTO unsupported protocol version"},
		{unavailable, "CLUSTERDOWN Hash slot not served"},
		{unavailable, "TRYAGAIN Multiple keys request during rehashing of slot"},
		{unavailable, "MOVED 1 127.0.0.1:1"},
		{unavailable, "ASK 1 127.0.0.1:1"},
		{unavailable, "ERR Script killed by user with SCRIPT KILL. script: abc, on @user_script:1."},
		{crossSlot, "CROSSSLOT Keys in request don't hash to the same slot"},
		// Proxies before clusters. Alibaba Cloud, Tair, "Common errors and troubleshooting" and "Usage of Lua scripts";
		// redis/redis#7684; RedisLabs/redis-cluster-proxy#86.
		{crossSlot, "ERR eval/evalsha command keys must be in same slot"},
		{crossSlot, "ERR 'EVAL' command keys must in same slot"},
		{crossSlot, "ERR 'evalsha' command keys must in same slot"},
		{crossSlot, "ERR Cross-slot queries are disabled. They can be enabled by using the --enable-cross-slot option, or by calling `PROXY CONFIG SET enable-cross-slot 1`."},
		{forbidden, "ERR bad lua script for redis cluster, all the keys that the script uses should be passed using the KEYS array"},
		{forbidden, "NOAUTH Authentication required."},
		{forbidden, "WRONGPASS invalid username-password pair or user is disabled."},
		{forbidden, "NOPERM User fleet has no permissions to run the 'evalsha' command"},
		{forbidden, "NOPERM this user has no permissions to access one of the keys used as arguments"},
		{forbidden, "WRONGTYPE Operation against a key holding the wrong kind of value script: abc, on @user_script:1."},
		{forbidden, "ERR unknown command 'EVALSHA', with args beginning with: "},
		{forbidden, "unknown command `EVALSHA`, with args beginning with: "},
		{forbidden, "ERR Error compiling script (new function): user_script:1: unexpected symbol near 'return'"},
		{forbidden, "ERR Unknown Redis command called from script script: abc, on @user_script:1."},
		{forbidden, "ERR invalid password"},
		{forbidden, "ERR AUTH <password> called without any password configured for the default user. Are you sure your configuration is correct?"},
		{forbidden, "ERR DB index is out of range"},
		{forbidden, "ERR This instance has cluster support disabled"},
		{both, "ERR user_script:1: attempt to index a nil value script: abc, on @user_script:1."},
		{both, "ERR value is not an integer or out of range script: abc, on @user_script:1."},
		{both, "ERR user_script:1: OOM boom script: abc, on @user_script:1."}, // an error of Lua in such words

		// Up to Redis 6 and KeyDB: redis/redis at 6.2, src/scripting.c; redisson/redisson issue 3897.
		{unavailable, "ERR Error running script (call to f_401d7fca): @user_script:1: @user_script: 1: -READONLY You can't write against a read only replica."},
		{unavailable, "ERR Error running script (call to f_0): @user_script:9: -OOM command not allowed when used memory > 'maxmemory'."},
		{unavailable, "ERR Error running script (call to f_0): @user_script:1: Script killed by user with SCRIPT KILL..."},
		{forbidden, "ERR Error running script (call to f_0): @user_script:1: WRONGTYPE Operation against a key holding the wrong kind of value"},
		{forbidden, "ERR Error running script (call to f_0): @user_script:1: @user_script: 1: Unknown Redis command called from Lua script"},
		{forbidden, "ERR Error running script (call to f_0): @user_script:1: @user_script: 1: The user executing the script can't run this command or subcommand"},
		{both, "ERR Error running script (call to f_0): @user_script:1: user_script:1: attempt to index"},

		// Redis 7.0, and 7.2 with Valkey: redis/redis, tests/unit/moduleapi/usercall.tcl; valkey-io/valkey, src/modules/lua/script_lua.c.
		{forbidden, "ERR The user executing the script can't run this command or subcommand script: f1, on @user_script:9."},
		{forbidden, "ERR ACL failure in script: User fleet has no permissions to run the 'time' command script: f1, on @user_script:4."},
		{forbidden, "ERR Unknown command called from script script: f1, on @user_script:4."},

		// KeyDB: Snapchat/KeyDB, src/server.cpp.
		{unavailable, "LOADING KeyDB is loading the dataset in memory"},
		{unavailable, "BUSY KeyDB is busy running a script. You can only call SCRIPT KILL or SHUTDOWN NOSAVE."},

		// Dragonfly: dragonflydb/dragonfly, src/facade/error.h, src/server/main_service.cc.
		{unavailable, "LOADING Dragonfly is loading the dataset in memory"},
		{unknown, "ERR script tried accessing undeclared key"},
		{unknown, "ERR Out of memory"}, // of any write
		{unknown, "ERR Cluster is not yet configured"},

		// Envoy: envoyproxy/envoy, source/extensions/filters/network/redis_proxy/command_splitter_impl.{h,cc}.
		{unavailable, "no upstream host"},
		{unknown, "upstream failure"},
		{unknown, "upstream protocol error"},
		{unknown, "invalid request"},
		{forbidden, "ERR Client sent AUTH, but no password is set"},

		// twemproxy answers strerror(errno): twitter/twemproxy, src/nc_message.c (msg_get_error).
		{unknown, "ERR Connection timed out"},
		{unknown, "ERR Connection refused"},
		{unknown, "ERR Connection reset by peer"},
		{unknown, "ERR Host is down"},
		{unknown, "ERR unknown"},

		// Codis may have run a script while it moved a slot: CodisLabs/codis, pkg/proxy/session.go, pkg/proxy/forward.go.
		{unknown, "ERR handle request, slot is not ready, may be offline"},
		{unknown, "ERR handle response, resp is required"},
		{unknown, "ERR router is not online"},
		{forbidden, "ERR invalid DB index, only accept DB [0,16)"},

		// Corvus: eleme/corvus, src/command.c.
		{unknown, "ERR Proxy error"},
		{unknown, "ERR Proxy timed out"},
		{unknown, "ERR Proxy redirecting error"},

		// Dynomite: Netflix/dynomite issue 457. Camellia: netease-im/camellia issue 421.
		{unknown, "Err storage: Connection refused"},
		{unknown, "ERR proxy upstream connection not available"},

		// ElastiCache: StackExchange/StackExchange.Redis issue 2264; craigmcnamara/redis-elasticache issue 8.
		{unavailable, "READONLY You can't write against a read-only replica"},
		{unavailable, "READONLY You can't write against a read only slave."},

		// Upstash: upstash.com/docs/redis/troubleshooting.
		{unknown, "ERR max daily request limit exceeded. Limit: 10000, Usage: 10000."},
		{unknown, "ERR max requests limit exceeded."},
		{unknown, "ERR max concurrent connections exceeded"},
		{forbidden, "WRONGPASS invalid or missing auth token"},

		// Miniredis: alicebob/miniredis, redis.go.
		{forbidden, "ERR Error compiling script (new function): <string> line:1(column:6) near \"return\""},

		// Words of no server that is known: proxies of cloud services have many.
		{unknown, "ERR internal error"},
		{unknown, "ERR redis temporary failure"},
		{unknown, "UNAVAILABLE try again"},
		{unknown, "FAILOVER in progress"},
		{unknown, "BUSYBODY is no code of a refusal"},
		{unknown, ""},

		// Ours.
		{forbidden, "FLEETQUOTA the key holds no state of this rule and layout"},
		{forbidden, "ERR user_script:93: FLEETQUOTA the kernel returned no time script: abc, on @user_script:93."},
		{forbidden, "ERR Error running script (call to f_0): @user_script:93: user_script:93: FLEETQUOTA the kernel returned no time"},
		{unavailable, "ERR not supported: * (while connecting)"},
	} {
		for _, text := range []string{test.text, strings.TrimPrefix(test.text, "ERR ")} { // rueidis leaves ERR out
			cause := errors.New(text)
			err := ReplyError(cause)
			var got []string
			for _, class := range []error{quota.ErrUnavailable, quota.ErrIndeterminate, quota.ErrMisconfigured, quota.ErrCrossSlot, quota.ErrClosed, quota.ErrOverloaded, quota.ErrInvalid} {
				if errors.Is(err, class) {
					got = append(got, class.Error())
				}
			}
			if strings.Join(got, ", ") != test.class || !errors.Is(err, cause) {
				t.Errorf("ReplyError(%q): got %v, which is %q; want %q around the cause", text, err, got, test.class)
			}
			uncertain := test.class == unknown || test.class == both
			if charged := quota.Charged(err); (charged == quota.ChargeUnknown) != uncertain {
				t.Errorf("Charged of %q: got %v, want unknown: %v", text, charged, uncertain)
			}
			if sentinel := driver.Sentinel(err); uncertain && sentinel != quota.ErrIndeterminate {
				t.Errorf("Sentinel of %q: got %v, want ErrIndeterminate, which a breaker counts", text, sentinel)
			}
		}
	}
	for text, want := range map[string]bool{"NOSCRIPT No matching script. Please use EVAL.": true, "ERR NOSCRIPT": false} {
		if got := IsNoScript(errors.New(text)); got != want {
			t.Errorf("IsNoScript(%q): got %v, want %v", text, got, want)
		}
	}
}

// TestRights: the error of a right that is missing names the right and the line of the ACL.
func TestRights(t *testing.T) {
	for text, lacks := range map[string]string{
		"NOPERM User fleet has no permissions to run the 'evalsha' command":                          "the user lacks +evalsha;",
		"ERR ACL failure in script: User fleet has no permissions to run the 'TIME' command":         "the user lacks +time;",
		"NOPERM this user has no permissions to access one of the keys used as arguments":            "the user lacks ~PREFIX*",
		"ERR The user executing the script can't run this command or subcommand script: f1, on @u:9": "",
	} {
		got := ReplyError(errors.New(text)).Error()
		if !strings.Contains(got, lacks) || !strings.Contains(got, "+evalsha +eval +time +get +mget +set +del") {
			t.Errorf("ReplyError(%q): got %q, want a text with %q and the rights", text, got, lacks)
		}
	}
}

func TestTransportErrors(t *testing.T) {
	unknown := &tls.CertificateVerificationError{Err: x509.UnknownAuthorityError{}}
	for _, test := range []struct {
		cause, want error
		text        string
	}{
		{&net.OpError{Op: "dial", Err: syscall.ECONNREFUSED}, quota.ErrUnavailable, ""},
		{fmt.Errorf("redis: %w", &net.OpError{Op: "dial", Err: os.ErrDeadlineExceeded}), quota.ErrUnavailable, ""},
		{&net.OpError{Op: "dial", Err: unknown}, quota.ErrMisconfigured, "known authority"},
		{&net.OpError{Op: "dial", Err: &tls.CertificateVerificationError{Err: x509.HostnameError{Certificate: &x509.Certificate{}, Host: "h"}}}, quota.ErrMisconfigured, "holds for the host"},
		{&tls.CertificateVerificationError{Err: x509.CertificateInvalidError{Reason: x509.Expired}}, quota.ErrUnavailable, "expired"},
		{&net.OpError{Op: "dial", Err: tls.RecordHeaderError{Msg: "first record does not look like a TLS handshake"}}, quota.ErrUnavailable, "does not speak TLS; accepted"},
		{&net.OpError{Op: "read", Err: syscall.ECONNRESET}, quota.ErrIndeterminate, ""},
		{&net.OpError{Op: "write", Err: syscall.EPIPE}, quota.ErrIndeterminate, ""},
		{&net.OpError{Op: "read", Err: os.ErrDeadlineExceeded}, quota.ErrIndeterminate, ""},
		{io.EOF, quota.ErrIndeterminate, ""}, {io.ErrUnexpectedEOF, quota.ErrIndeterminate, ""},
		{context.DeadlineExceeded, quota.ErrIndeterminate, ""}, {context.Canceled, quota.ErrIndeterminate, ""},
		{errors.New("text of no class"), quota.ErrIndeterminate, ""},
	} {
		err := TransportError(test.cause)
		classes := 0
		for _, class := range []error{quota.ErrUnavailable, quota.ErrIndeterminate, quota.ErrMisconfigured} {
			if errors.Is(err, class) {
				classes++
			}
		}
		if !errors.Is(err, test.want) || !errors.Is(err, test.cause) || classes != 1 || !strings.Contains(err.Error(), test.text) {
			t.Errorf("TransportError(%v): got %v, want only %v around the cause, with %q", test.cause, err, test.want, test.text)
		}
		if err := ConnectError(test.cause, false); errors.Is(err, quota.ErrIndeterminate) || quota.Charged(err) != quota.NotCharged {
			t.Errorf("ConnectError(%v): got %v, want an error that says 'not charged'", test.cause, err)
		}
	}
	for _, reply := range []string{"ERR not supported", "LOADING wait", "WRONGPASS no"} {
		if err := ConnectError(errors.New(reply), true); quota.Charged(err) != quota.NotCharged {
			t.Errorf("ConnectError(%q): got %v, want an error that says 'not charged'", reply, err)
		}
	}
}
