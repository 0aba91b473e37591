package engine

import (
	"context"
	"errors"
	"strings"
	"testing"

	"github.com/alicebob/miniredis/v2"
	"github.com/redis/go-redis/v9"

	"github.com/fleetquota/fleetquota/quota"
)

// otherwise is a server whose Lua computes something else: old is replaced by new in the scripts that it gets.
type otherwise struct {
	fake
	info string
}

func (otherwise) Warm(context.Context, string, string) error { return nil }
func (o otherwise) Info(context.Context) ([]string, error)   { return []string{o.info}, nil }
func (otherwise) Ping(context.Context, string, string) error { return nil }

var _ Warmer = otherwise{}

func withLua(t *testing.T, old, new string) (fake, *redis.Client) {
	t.Helper()
	client := redis.NewClient(&redis.Options{Addr: miniredis.RunT(t).Addr()})
	t.Cleanup(func() { client.Close() })
	var calls int
	send := sender(client, &calls)
	return func(args []any, keys int) (Reply, error) {
		if args[0] != eval {
			return nil, errors.New("NOSCRIPT")
		}
		text := args[1].(string)
		if !strings.Contains(text, old) {
			t.Errorf("got a script without %q, want one with it", old)
		}
		args[1] = strings.Replace(text, old, new, 1)
		return send(args, keys)
	}, client
}

// garnet is a library struct whose pack writes an integer of 4 bytes in front of the 7, as one server does.
const garnet = `{
  pack = function(_, ...)
    local numbers, bytes = {...}, ''
    for i = 1, #numbers do
      local x, b = numbers[i] % 4294967296, {}
      for j = 4, 1, -1 do b[j] = x % 256 x = (x - b[j]) / 256 end
      bytes = bytes .. string.char(b[1], b[2], b[3], b[4], 0, 0, 0)
    end
    return bytes
  end,
  unpack = function(format, v, at)
    at = at or 1
    local numbers = {}
    for i = 1, (#format - 1) / 2 do
      local x = string.byte(v, at)
      if sub(format, 2, 2) == 'i' and x >= 128 then x = x - 256 end
      for j = at + 1, at + 6 do x = x * 256 + string.byte(v, j) end
      numbers[i] = x
      at = at + 7
    end
    return (table.unpack or unpack)(numbers)
  end,
}`

// TestProbe: a server that computes something else than the scripts need is told before it writes, by its kind, its
// version and the function that is wrong, and with Health.
func TestProbe(t *testing.T) {
	const library = "rawget(_G, 'struct')"
	for _, test := range []struct{ name, old, new, says string }{
		{"right", "", "", ""},
		{"garnet", library, garnet, "struct.pack"},
		{"unpack without a sign", library, strings.Replace(garnet, "sub(format, 2, 2) == 'i'", "false", 1), "struct.unpack"},
		{"rounding", "= math.floor, math.ceil,", "= math.floor, function(x) return math.floor(x + 0.5) end,", "math.ceil"},
		{"small numbers", "return {", "m = m % 4294967296 return {", "numbers in arguments"},
	} {
		t.Run(test.name, func(t *testing.T) {
			send, client := withLua(t, test.old, test.new)
			s, err := New(otherwise{send, "garnet_version:1.0.84\r\nredis_version:7.4.3\r\n"}, false, Options{Batching: BatchAll})
			if err != nil {
				t.Fatal(err)
			}
			defer s.Close()
			c := quota.Charge{Limit: limitOf("l", window(10)), Key: "k", Cost: 3}
			_, taken := s.Charge(bg, c)
			_, asked := s.Health(bg)
			if test.says == "" {
				if taken != nil || asked != nil {
					t.Errorf("Charge and Health: got errors %v and %v, want none", taken, asked)
				}
				return
			}
			for name, err := range map[string]error{"Charge": taken, "Health": asked} {
				if !errors.Is(err, quota.ErrMisconfigured) || quota.Charged(err) != quota.NotCharged {
					t.Errorf("%s: got error %v, want ErrMisconfigured that says 'not charged'", name, err)
					continue
				}
				for _, part := range []string{"garnet 1.0.84", test.says, "accepted: "} {
					if !strings.Contains(err.Error(), part) {
						t.Errorf("%s: got error %v, want one that says %q", name, err, part)
					}
				}
			}
			if n := client.DBSize(bg).Val(); n != 0 {
				t.Errorf("keys: got %d, want none", n)
			}
		})
	}
}

// TestProbeRefused: a server that refuses the question for one key is asked again with the next key, and before that
// decides nothing.
func TestProbeRefused(t *testing.T) {
	var asked, decided []string
	send := fake(func(args []any, _ int) (Reply, error) {
		key := args[3].(string)
		if r := probeReply(args); r != nil {
			asked = append(asked, key)
			if strings.Contains(key, "hers") {
				return nil, ReplyError(errors.New("NOPERM No permissions to access a key"))
			}
			return r, nil
		}
		decided = append(decided, key)
		return singleReply(1, ""), nil
	})
	s, err := New(otherwise{send, ""}, false, Options{Batching: BatchAll})
	if err != nil {
		t.Fatal(err)
	}
	defer s.Close()
	limit := limitOf("l", window(10))
	if _, err := s.Charge(bg, quota.Charge{Limit: limit, Key: "hers", Cost: 1}); !errors.Is(err, quota.ErrMisconfigured) {
		t.Errorf("a key that is refused: got error %v, want ErrMisconfigured", err)
	}
	for range 2 {
		if _, err := s.Charge(bg, quota.Charge{Limit: limit, Key: "mine", Cost: 1}); err != nil {
			t.Errorf("another key: got error %v, want none", err)
		}
	}
	if got := strings.Join(asked, " "); got != "quota:{hers}:l quota:{hers}:l quota:{mine}:l" {
		t.Errorf("asked for: got %s, want hers twice and mine once", got)
	}
	if got := strings.Join(decided, " "); got != "quota:{mine}:l quota:{mine}:l" {
		t.Errorf("decided: got %s, want mine twice", got)
	}
}
