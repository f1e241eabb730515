import com.eteks.sweethome3d.swing.ModelPreviewComponent;
import com.eteks.sweethome3d.tools.URLContent;
import java.awt.Color;
import java.awt.Dimension;
import java.awt.EventQueue;
import java.awt.Point;
import java.awt.Rectangle;
import java.awt.Robot;
import java.awt.image.BufferedImage;
import java.io.File;
import java.nio.file.Files;
import java.nio.file.Paths;
import java.util.Arrays;
import javax.imageio.ImageIO;
import javax.swing.JFrame;
import javax.swing.SwingUtilities;

/**
 * Lets Sweet Home 3D draw models as its previews show them, over white and over black.
 *
 * <p>Arguments: a list and a side in pixels. Each line of the list holds, separated by tabs: an OBJ file, the path
 * of the pictures without their ending, nine numbers of a rotation or nothing, and degrees of the camera beside
 * the front and above. Pictures that exist are passed over.
 */
public class IconDraw {
    static class Preview extends ModelPreviewComponent {
        Preview(String[] words, int side) throws Exception {
            setPreferredSize(new Dimension(side, side));
            setModel(new URLContent(new File(words[0]).toURI().toURL()));
            if (!words[2].isEmpty()) {
                String[] numbers = words[2].trim().split("\\s+");
                float[][] rotation = new float[3][3];
                for (int k = 0; k < 9; k++) rotation[k / 3][k % 3] = Float.parseFloat(numbers[k]);
                setModelRotation(rotation);
            }
            setViewYaw((float) Math.toRadians(Float.parseFloat(words[3])));
            setViewPitch((float) -Math.toRadians(Float.parseFloat(words[4])));
            setBackground(Color.WHITE);
        }
    }

    /** The picture on the screen, once two in a row are equal and show an object before the background. */
    static void capture(Robot robot, Preview shown, int side, Color behind, String file) throws Exception {
        Point corner = new Point();
        SwingUtilities.convertPointToScreen(corner, shown);
        int[] before = null;
        for (int k = 0; k < 60; k++) {
            Thread.sleep(100);
            BufferedImage image = robot.createScreenCapture(new Rectangle(corner, new Dimension(side, side)));
            int[] now = image.getRGB(0, 0, side, side, null, 0, side);
            long drawn = Arrays.stream(now).filter(pixel -> pixel != behind.getRGB()).count();
            boolean whole = now[5 * side + 5] == behind.getRGB() && drawn > 4 * side && drawn < 0.97 * side * side;
            if ((whole || k > 30) && Arrays.equals(now, before)) {
                ImageIO.write(image, "png", new File(file));
                return;
            }
            before = now;
        }
        throw new IllegalStateException("no two captures were equal");
    }

    public static void main(String[] arguments) throws Exception {
        int side = Integer.parseInt(arguments[1]);
        Robot robot = new Robot();
        for (String line : Files.readAllLines(Paths.get(arguments[0]))) {
            String[] words = line.split("\t", -1);
            if (new File(words[1] + ".black.png").exists()) continue;
            JFrame frame = new JFrame();
            frame.setUndecorated(true);
            Preview[] preview = new Preview[1];
            try {
                EventQueue.invokeAndWait(() -> {
                    try {
                        preview[0] = new Preview(words, side);
                    } catch (Exception error) {
                        throw new RuntimeException(error);
                    }
                    frame.add(preview[0]);
                    frame.pack();
                    frame.setLocation(10, 10);
                    frame.setVisible(true);
                });
                capture(robot, preview[0], side, Color.WHITE, words[1] + ".white.png");
                EventQueue.invokeAndWait(() -> preview[0].setBackground(Color.BLACK));
                capture(robot, preview[0], side, Color.BLACK, words[1] + ".black.png");
            } catch (Exception error) {
                System.out.println(words[0] + ": " + error);
            }
            EventQueue.invokeAndWait(frame::dispose);
        }
        System.exit(0);
    }
}
